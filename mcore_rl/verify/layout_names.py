"""Names of parallel layouts: axis and size, one after the other, as in `tp2pp2` or `ep2dp4`.

A size that is not named is 1, with two exceptions that are those of the configuration: `etp` is
`tp`, and sequence parallelism is on where `tp` > 1, unless `sp0` turns it off. `dp` is the number
of data-parallel ranks, which is also where experts are spread; when it is not named it is the
smallest that holds them.

Nothing here knows a model: `models.layout.check_layout` says what divides one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mcore_rl.errors import require

_KEYS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_PART = re.compile(rf"({'|'.join(_KEYS)}|dp)([1-9]\d*)|(sp)(0)")


@dataclass(frozen=True, slots=True)
class NamedLayout:
    """A layout as the user wrote it."""

    name: str
    sizes: dict[str, int]
    """Of the axes that the name names."""

    @property
    def dp(self) -> int:
        tp, cp, ep = (self.sizes.get(axis, 1) for axis in ("tp", "cp", "ep"))
        expert_ranks = ep * self.sizes.get("etp", tp)
        return self.sizes.get("dp", expert_ranks // math.gcd(expert_ranks, tp * cp))

    @property
    def num_processes(self) -> int:
        return self.dp * math.prod(self.sizes.get(axis, 1) for axis in ("tp", "pp", "cp"))

    @property
    def overrides(self) -> list[str]:
        """The layout as `key=value` pairs of a run's configuration."""
        pairs = [
            f"actor.megatron.{key}={self.sizes[axis]}"
            for axis, key in _KEYS.items()
            if axis in self.sizes
        ]
        if "sp" in self.sizes:
            pairs.append("actor.megatron.sequence_parallel=false")
        return [*pairs, f"trainer.n_gpus_per_node={self.num_processes}"]


def parse_layout(name: str, option: str = "--layouts") -> NamedLayout:
    """Return the layout called `name`; `option` is where the user wrote it.

    Raises:
        UserError: if it is not made of known axes, names one twice, or has `sp0` without `tp`.
    """
    parts = [(m[1] or m[3], int(m[2] or m[4])) for m in _PART.finditer(name)]
    spelt = "".join(f"{axis}{size}" for axis, size in parts)
    require(
        bool(parts) and spelt == name,
        option,
        name,
        f"is not made of {', '.join(_KEYS)}, dp, each with a size of at least 1, or sp0",
        "Examples: tp2pp2, pp2vpp2, ep2dp4, tp2sp0.",
    )
    sizes = dict(parts)
    require(len(sizes) == len(parts), option, name, "names an axis twice")
    require(
        "sp" not in sizes or sizes.get("tp", 1) > 1,
        option,
        name,
        "turns sequence parallelism off, which is on only with tp of at least 2",
        "Leave out sp0.",
    )
    return NamedLayout(name, sizes)


def parse_layouts(names: str) -> list[NamedLayout]:
    """Return the layouts of a comma-separated list.

    Raises:
        UserError: as `parse_layout`, and if a name comes twice.
    """
    layouts = [parse_layout(name.strip()) for name in names.split(",")]
    repeated = [a.name for i, a in enumerate(layouts) if a in layouts[:i]]
    require(not repeated, "--layouts", names, f"names {', '.join(repeated)} twice")
    return layouts
