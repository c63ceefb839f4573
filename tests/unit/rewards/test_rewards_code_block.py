"""Which code of a response is the program."""

import time

import pytest

from mcore_rl.rewards.code_block import last_program

CODE = "if True:\n    print(1)\n"


@pytest.mark.parametrize(
    "fence",
    [
        "```python\n{}```",
        "```python\n{}\n```",
        "```Python \n{}```",
        "```PYTHON3\n{}```",
        "```py title='a b.py' linenums=1\n{}```",
        "```{{.python .numbers}}\n{}```",
        "``` {{python}}\n{}```",
        "``` python\n{}```",
        "````python\n{}````",
        "~~~python\n{}~~~",
        "The program: ```python\n{}``` is right",
        "```\n{}```",
        "- ```python\n{}```",
    ],
)
def test_a_fence_may_name_its_language_in_many_ways(fence):
    for line_end in ("\n", "\r\n"):
        response = f"So:\n\n{fence.format(CODE)}\n\nDone.".replace("\n", line_end)
        found = last_program(response)
        assert found is not None
        assert found.rstrip("\n") + "\n" == CODE


def test_tildes_open_a_block_only_where_they_begin_a_line():
    assert last_program(f"So ~~~python\n```python\n{CODE}```") == CODE


@pytest.mark.parametrize("line", ["Use ```print(0)```", "It is ```python as you know"])
def test_backticks_within_a_line_open_a_block_only_where_a_name_or_nothing_follows(line):
    assert last_program(f"{line}\n{CODE}```") is None


def test_an_indented_block_loses_the_indentation_of_its_first_line():
    for indent in ("  ", "\t", "    "):
        block = "```python\nif True:\n\n    print(1)\n```"
        response = "1. So:\n" + "".join(f"{indent}{line}\n" for line in block.split("\n"))
        assert last_program(response) == "if True:\n\n    print(1)\n"
    # A text over several lines may begin further to the left.
    assert last_program("  ```py\n  x = '''\na'''\n  ```") == "x = '''\na'''\n"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\n1\n```\n```py\n2\n```\n```\n3\n```", "2\n"),
        ("```\n1\n```\n```c++\n2\n```", "2\n"),
        ("```python\n1\n```\n```c++\n2\n```", "1\n"),
        ("```python\nprint('``')\n```", "print('``')\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\nprint(1)```", "print(1)\n"),
        ("````\n```python\n1\n```\n````", "```python\n1\n```\n"),
        ("```python\n1\n```python\n2\n```", "2\n"),  # the first was never closed
        ("```python\n1\n```\n```python\n2", "1\n"),
        ("print(1)", None),
        ("```python\nprint(1)", None),
        ("Use ```x``` or ``` here.", None),
        ("Use ```x```\nor `y`\n", None),
        ("```python\n```", ""),
        ("", None),
    ],
)
def test_the_last_python_block_that_ends_is_the_program(response, program):
    assert last_program(response) == program


@pytest.mark.parametrize(
    "piece",
    ["`", "```", "```\n", "```python\n", "~", "`a", "```a`", "\n", " ", "```python\n1\n```\n", "{"],
)
def test_the_time_is_linear_in_the_length(piece):
    """A quadratic search would take minutes."""
    start = time.process_time()
    last_program(piece * (2**20 // len(piece)))
    last_program("```python\n" + piece * (2**20 // len(piece)) + "\n```")
    assert time.process_time() - start < 20
