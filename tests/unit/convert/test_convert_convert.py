"""Both conversions in this process; that Megatron reads the result is in tests/distributed."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mcore_rl.checkpoint_metadata import METADATA_FILE
from mcore_rl.convert import __main__ as command
from mcore_rl.convert import convert, verify
from mcore_rl.convert.convert import hf_to_mcore, mcore_to_hf
from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError
from mcore_rl.models.safetensors_io import CheckpointReader
from tests import poison
from tests.file_limit import files_no_longer_than
from tests.hub_cache import COMMIT, put_model
from tests.tiny_models import MODELS

FILE_BYTES = 20_000
"""Several files for a tiny model."""


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def tensors(folder):
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", MODELS)
def test_every_family_comes_back_bit_by_bit(tiny_checkpoint, tmp_path, name):
    source = tiny_checkpoint(name)
    hf_to_mcore(source, tmp_path / "mcore", file_bytes=FILE_BYTES)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", file_bytes=FILE_BYTES)
    assert_same_tensors(tensors(tmp_path / "hf"), tensors(source))
    assert (tmp_path / "hf/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert len(list((tmp_path / "mcore").glob("*.distcp"))) > 2
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1


def test_pieces_may_be_single_rows(tiny_checkpoint, tmp_path, monkeypatch):
    """Large tensors are cut into pieces of rows, also through queries, keys and values."""
    monkeypatch.setattr(convert, "PIECE_BYTES", 300)  # two rows of 32 float32, six of 12
    hf_to_mcore(tiny_checkpoint("deepseek_v3"), tmp_path / "mcore")
    hf_to_mcore(tiny_checkpoint("glm4_moe"), tmp_path / "glm")
    for name, mcore in (("deepseek_v3", "mcore"), ("glm4_moe", "glm")):
        mcore_to_hf(tmp_path / mcore, tmp_path / name)
        assert_same_tensors(tensors(tmp_path / name), tensors(tiny_checkpoint(name)))


def test_weights_become_the_dtype_asked_for_and_biases_of_routers_stay(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("deepseek_v3")
    expected = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in tensors(source).items()
    }
    hf_to_mcore(source, tmp_path / "mcore", dtype=torch.bfloat16)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert_same_tensors(tensors(tmp_path / "hf"), expected)
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"

    hf_to_mcore(source, tmp_path / "float32")
    mcore_to_hf(tmp_path / "float32", tmp_path / "late", dtype=torch.bfloat16)
    assert_same_tensors(tensors(tmp_path / "late"), expected)


def test_the_folder_keeps_tokenizer_and_template(tiny_checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("qwen3"), source)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (source / name).write_text(name)
    hf_to_mcore(source, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()


@pytest.fixture
def conversions(tiny_checkpoint, tmp_path):
    """Return a function: direction -> function(out, **options) that converts a mixture."""
    mcore = tmp_path / "input"
    hf_to_mcore(tiny_checkpoint("qwen3_moe"), mcore)

    def of(direction):
        run, source = {
            "hf-to-mcore": (hf_to_mcore, tiny_checkpoint("qwen3_moe")),
            "mcore-to-hf": (mcore_to_hf, mcore),
        }[direction]
        return lambda out, **options: run(source, out, file_bytes=FILE_BYTES, **options)

    return of


DIRECTIONS = pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])


class StopHereError(Exception):
    """What a conversion is stopped with."""


def stop_at(share):
    def progress(done, total):
        if done > share * total:
            raise StopHereError

    return progress


@DIRECTIONS
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(conversions, tmp_path, direction, share):
    run, whole, out = conversions(direction), tmp_path / "whole", tmp_path / "out"
    run(whole)
    with pytest.raises(StopHereError):
        run(out, progress=stop_at(share))
    assert not out.exists()
    partial = tmp_path / "out.partial"
    finished = {f: f.stat().st_ino for f in partial.iterdir() if f.suffix != ".tmp"}
    run(out)
    assert contents(out) == contents(whole)
    assert not partial.exists()
    kept = [
        f
        for f, inode in finished.items()
        if (out / f.name).exists() and (out / f.name).stat().st_ino == inode
    ]
    assert any(f.suffix in (".distcp", ".safetensors") for f in kept) == (share > 0)


@DIRECTIONS
@pytest.mark.starts_processes
def test_a_killed_process_leaves_no_output_and_the_next_one_goes_on(
    conversions, tiny_checkpoint, tmp_path, direction
):
    """SIGKILL in the middle, between two writes."""
    run, whole, out = conversions(direction), tmp_path / "whole", tmp_path / "out"
    run(whole)
    source = tiny_checkpoint("qwen3_moe") if direction == "hf-to-mcore" else tmp_path / "input"
    program = (
        "import os, sys\n"
        "from mcore_rl.convert import convert\n"
        "run = getattr(convert, sys.argv[1].replace('-', '_'))\n"
        "def progress(done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), 9)\n"
        f"run(sys.argv[2], sys.argv[3], file_bytes={FILE_BYTES}, progress=progress)\n"
    )
    args = [sys.executable, "-c", program, direction, str(source), str(out)]
    killed = subprocess.run(args, timeout=240, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    run(out)
    assert contents(out) == contents(whole)


@DIRECTIONS
def test_another_conversion_starts_from_nothing(conversions, tmp_path, direction):
    run, whole, out = conversions(direction), tmp_path / "whole", tmp_path / "out"
    run(whole, dtype=torch.bfloat16)
    with pytest.raises(StopHereError):
        run(out, progress=stop_at(0.5))
    run(out, dtype=torch.bfloat16)
    assert contents(out) == contents(whole)


@DIRECTIONS
def test_a_full_disk_ends_the_conversion_and_it_goes_on_later(conversions, tmp_path, direction):
    """/dev/full in place of a file that is not finished gives the kernel's own ENOSPC."""
    run, whole, out = conversions(direction), tmp_path / "whole", tmp_path / "out"
    run(whole)
    with pytest.raises(StopHereError):
        run(out, progress=stop_at(0.5))
    (unfinished,) = (tmp_path / "out.partial").glob("*.tmp")
    unfinished.unlink()
    unfinished.symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        run(out)
    assert error.value.errno == errno.ENOSPC
    assert not out.exists()
    unfinished.unlink()
    run(out)
    assert contents(out) == contents(whole)


def test_the_command_reports_a_full_disk_in_one_line(tiny_checkpoint, tmp_path, capsys):
    """Every file may have 10,000 bytes, a limit that the kernel has for a process."""
    args = ["hf-to-mcore", str(tiny_checkpoint("qwen3")), str(tmp_path / "out")]
    with files_no_longer_than(10_000), pytest.raises(SystemExit) as ended:
        command.main(args)
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: [Errno 27] File too large")
    assert "out.partial" in line
    assert not (tmp_path / "out").exists()
    command.main(args)
    assert (tmp_path / "out").is_dir()


@DIRECTIONS
def test_a_file_that_cannot_be_flushed_ends_the_conversion_after_the_next_file(
    conversions, tmp_path, monkeypatch, direction
):
    """An error that NFS gives at fsync, for the second file, without the kernel's help."""
    run, whole, out = conversions(direction), tmp_path / "whole", tmp_path / "out"
    run(whole)
    names = sorted(f.name for f in whole.iterdir() if f.suffix in (".distcp", ".safetensors"))
    fsync = os.fsync

    def failing_fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{names[1]}.tmp"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        with pytest.raises(OSError) as error:
            run(out)
    assert error.value.errno == errno.EDQUOT
    left = sorted(file.name for file in (tmp_path / "out.partial").iterdir())
    assert left == [names[0], f"{names[1]}.tmp", f"{names[2]}.tmp"]
    assert len(names) > 4
    run(out)
    assert contents(out) == contents(whole)


def times_of_weights(folder):
    """When each was written last; small numbers of inodes are given again at once."""
    files = [*folder.glob("__0_[0-9]*.distcp"), *folder.glob("*.safetensors")]
    return {file.name: file.stat().st_mtime_ns for file in files}


def rename_of(folder, instead):
    """Return `Path.rename` that for `folder` does something else."""
    rename = Path.rename
    return lambda path, target: (instead if path == folder else rename)(path, target)


@DIRECTIONS
def test_a_folder_that_cannot_get_its_name_gets_it_later_with_the_same_files(
    conversions, tmp_path, monkeypatch, direction
):
    run, partial, out = conversions(direction), tmp_path / "out.partial", tmp_path / "out"

    def fail(path, target):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_of(partial, fail))
        with pytest.raises(OSError, match="Input/output"):
            run(out)
    finished = times_of_weights(partial)
    run(out)
    assert times_of_weights(out) == finished
    assert len(finished) > 4


@DIRECTIONS
def test_a_conversion_stopped_right_after_its_folder_got_its_name_is_whole(
    conversions, tmp_path, monkeypatch, direction
):
    run, whole, out = conversions(direction), tmp_path / "whole", tmp_path / "out"
    run(whole)
    rename = Path.rename

    def rename_and_stop(path, target):
        rename(path, target)
        raise StopHereError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_of(tmp_path / "out.partial", rename_and_stop))
        with pytest.raises(StopHereError):
            run(out)
    assert contents(out) == contents(whole)
    with pytest.raises(UserError, match=r"output='.*out' exists"):
        run(out)
    shutil.rmtree(out)
    run(out)
    assert contents(out) == contents(whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["input", "out", "whole"]


def test_output_that_exists_is_refused_and_intact(conversions, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"output='.*out' exists"):
        conversions("mcore-to-hf")(tmp_path / "out")
    assert contents(tmp_path / "out") == {"model.safetensors": b"precious"}
    assert not (tmp_path / "out.partial").exists()


def test_a_second_process_may_not_write_the_same_output(conversions, tmp_path):
    run, out = conversions("mcore-to-hf"), tmp_path / "out"

    def progress(done, total):
        if done:
            with pytest.raises(UserError, match="being written by another process"):
                run(out)
            raise StopHereError

    with pytest.raises(StopHereError):
        run(out, progress=progress)
    run(out)
    assert out.is_dir()


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def in_two_shards(folder):
    """Make two shards and an index of the single file."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"shard{i % 2}.safetensors" for i, name in enumerate(sorted(whole))}
    for file in ("shard0.safetensors", "shard1.safetensors"):
        save_file({n: whole[n] for n, where in weight_map.items() if where == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def lose_a_shard(folder):
    in_two_shards(folder)
    (folder / "shard1.safetensors").unlink()


def swap_a_place(folder):
    weight_map = in_two_shards(folder)
    name = min(weight_map)
    other = {"shard0.safetensors": "shard1.safetensors", "shard1.safetensors": "shard0.safetensors"}
    weight_map[name] = other[weight_map[name]]
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)


def make_an_integer(folder):
    whole = load_file(folder / "model.safetensors")
    whole["model.norm.weight"] = whole["model.norm.weight"].to(torch.int32)
    save_file(whole, folder / "model.safetensors")


ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}

BROKEN_HF = {
    "cut short": (lambda f: cut(f / "model.safetensors"), "damaged or cut short"),
    "shard missing": (lose_a_shard, "lacks 1 of the shards"),
    "index wrong": (swap_a_place, "which the index says it holds"),
    "no index": (lambda f: (f / "model.safetensors").unlink(), "has neither"),
    "family": (lambda f: edit_json(f / "config.json", model_type="rwkv"), "rwkv"),
    "shape": (lambda f: edit_json(f / "config.json", intermediate_size=64), "config.json asks for"),
    "layers": (lambda f: edit_json(f / "config.json", **ONE_LAYER), "no place for"),
    "dtype": (make_an_integer, "is not one of F32, BF16, F16"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
}

BROKEN_MCORE = {
    "cut short": (lambda f: cut(f / "__0_0.distcp"), "is cut short"),
    "file missing": (lambda f: (f / "__0_0.distcp").unlink(), "lacks its file __0_0.distcp"),
    "unfinished": (lambda f: (f / "metadata.json").unlink(), "has no metadata.json"),
    "no metadata": (lambda f: (f / ".metadata").unlink(), "has no .metadata"),
    "metadata cut": (lambda f: cut(f / ".metadata"), "is damaged"),
    "metadata of another format": (lambda f: (f / ".metadata").write_text("{}"), "is damaged"),
    "numbers damaged": (
        lambda f: (f / "__0_0.distcp").write_bytes(bytes((f / "__0_0.distcp").stat().st_size)),
        "is damaged at byte 0",
    ),
    "shape": (lambda f: edit_json(f / "config.json", intermediate_size=64), "config.json asks for"),
    "experts": (lambda f: edit_json(f / "config.json", model_type="llama"), "no place for|no tens"),
    "no config": (lambda f: (f / "config.json").unlink(), "--config-from"),
}


@pytest.mark.parametrize("fault", BROKEN_HF)
def test_a_broken_folder_is_one_clear_line(tiny_checkpoint, tmp_path, capsys, fault):
    source, (break_it, message) = tmp_path / "source", BROKEN_HF[fault]
    shutil.copytree(tiny_checkpoint("qwen3"), source)
    break_it(source)
    assert_refused(["hf-to-mcore", source, tmp_path / "out"], message, capsys)


@pytest.mark.parametrize("fault", BROKEN_MCORE)
def test_a_broken_distributed_checkpoint_is_one_clear_line(
    tiny_checkpoint, tmp_path, capsys, fault
):
    source, (break_it, message) = tmp_path / "source", BROKEN_MCORE[fault]
    hf_to_mcore(tiny_checkpoint("qwen3"), source)
    break_it(source)
    assert_refused(["mcore-to-hf", source, tmp_path / "out"], message, capsys)


def test_code_in_the_metadata_is_refused_by_convert_and_verify_and_not_run(
    tiny_checkpoint, tmp_path, capsys
):
    source, mcore, called = tiny_checkpoint("qwen3"), tmp_path / "mcore", tmp_path / "called"
    hf_to_mcore(source, mcore)
    good = (mcore / METADATA_FILE).read_bytes()
    (mcore / METADATA_FILE).write_bytes(poison.in_front_of(good, called))
    message = r"mcore/\.metadata is refused, and nothing in it was run: it asks for posix\.mkdir"
    assert_refused(["mcore-to-hf", mcore, tmp_path / "out"], message, capsys)
    for written in ("mcore", "hf"):
        with pytest.raises(UserError, match=message):
            verify.verify(mcore=mcore, hf=source, written=written, prompts=[])
    assert not called.exists()


def assert_refused(args, message, capsys):
    """The command ends with exit code 2, one line and no output."""
    with pytest.raises(SystemExit) as ended:
        command.main([str(arg) for arg in args])
    assert ended.value.code == USER_ERROR_EXIT_CODE
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(message, line), line
    assert not Path(args[2]).exists()


def test_a_run_s_checkpoint_takes_the_model_of_its_configuration(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    step = tmp_path / "run/checkpoints/global_step_3"
    hf_to_mcore(source, step / "actor")
    (step / "actor/config.json").unlink()
    (tmp_path / "run/config.yaml").write_text(f"model: {{path: {source}}}")
    mcore_to_hf(step, tmp_path / "hf")
    assert_same_tensors(tensors(tmp_path / "hf"), tensors(source))


def test_models_of_the_hub_are_converted_by_their_names(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    """As input, as --config-from, and in the configuration of a run."""
    source, name = tiny_checkpoint("qwen3"), "Qwen/Qwen3-tiny"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put_model(tmp_path / "hub", name, source)
    step = tmp_path / "run/checkpoints/global_step_3"
    command.main(["hf-to-mcore", name, str(step / "actor")])
    (step / "actor/config.json").unlink()
    command.main(["mcore-to-hf", str(step), str(tmp_path / "hf"), "--config-from", f"{name}@main"])
    (tmp_path / "run/config.yaml").write_text(f"model: {{path: {name}@{COMMIT}}}")
    command.main(["mcore-to-hf", str(step), str(tmp_path / "again")])
    for folder in ("hf", "again"):
        assert_same_tensors(tensors(tmp_path / folder), tensors(source))
    for args in (["hf-to-mcore", "nobody/none"], ["mcore-to-hf", step]):
        more = ["--config-from", "nobody/none"] if args[0] == "mcore-to-hf" else []
        option = more[0] if more else "input"
        message = rf"{option}='nobody/none' is no folder here, and the cache .* HF_HUB_OFFLINE=0"
        assert_refused([*args, tmp_path / "out", *more], message, capsys)


def test_prompts_without_verify_are_refused(tmp_path, capsys):
    assert_refused(["hf-to-mcore", "x", tmp_path / "out", "--prompt", "Hi"], "no effect", capsys)


VERIFY = """
import sys
from mcore_rl.convert.verify import verify
for mcore, hf in zip(sys.argv[1::2], sys.argv[2::2]):
    print(verify(mcore=mcore, hf=hf, written="mcore", prompts=[]))
"""


@pytest.mark.starts_processes
def test_verify_tells_the_same_model_from_another(tiny_checkpoint, tmp_path):
    """In a process of its own: Megatron's support for CPU stays installed where it was.

    The norms inside latent attention have the epsilon of the others, which transformers does not
    give them: without that, logits differ by 1.7e-2 and 2.2.
    """
    source = tiny_checkpoint("qwen3_moe")
    hf_to_mcore(source, tmp_path / "mcore", dtype=torch.bfloat16)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    changed = load_file(file)
    changed["model.layers.1.mlp.experts.3.up_proj.weight"][5, 7] += 2
    save_file(changed, file, {"format": "pt"})
    pairs = [(tmp_path / "mcore", source), (tmp_path / "mcore", tmp_path / "other")]
    for name in ("deepseek_v3", "moonlight"):
        latent = tiny_checkpoint(name, rms_norm_eps=1e-3)
        hf_to_mcore(latent, tmp_path / name)
        pairs.append((tmp_path / name, latent))
    folders = [str(folder) for pair in pairs for folder in pair]
    *_, same, different, v3, moonlight = subprocess.run(
        [sys.executable, "-c", VERIFY, *folders],
        timeout=240,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    # Observed: logits of size 6 that differ by 6e-6.
    assert same.startswith("verified: 45 tensors equal bit by bit; logits differ by")
    assert different.startswith("NOT THE SAME: 1 of 45 tensors differ, first model.layers.1.mlp")
    # Observed: logits of size 7 that differ by 1.6e-5 and 7e-6.
    assert v3.startswith("verified: "), v3
    assert moonlight.startswith("verified: "), moonlight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["megatron", "transformers", "both"])
def test_verify_refuses_logits_that_are_not_finite(
    tiny_checkpoint, tmp_path, monkeypatch, side, value
):
    """In the second of two prompts; the numbers stand for what the models would give."""

    def logits(*names):
        second = torch.zeros(3, 5)
        second[1, 2] = value if side in names else 0
        return lambda *_: [torch.full((3, 5), 0.1), second]

    monkeypatch.setattr(verify, "_megatron_logits", logits("megatron", "both"))
    monkeypatch.setattr(verify, "_transformers_logits", logits("transformers", "both"))
    source = tiny_checkpoint("qwen3")
    hf_to_mcore(source, tmp_path / "mcore")
    comparison = verify.verify(mcore=tmp_path / "mcore", hf=source, written="mcore", prompts=[])
    assert not comparison.passed
    assert str(comparison).startswith("NOT THE SAME: ")
    assert str(comparison).endswith("tensors equal bit by bit; not all logits are finite")
