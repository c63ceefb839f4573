"""The quickstart's additions as rows of the reward digits_right.

python examples/custom_reward/make_rows.py outputs/quickstart/data/train.parquet rows.parquet
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main(source: str, target: str) -> None:
    """Copy a file with another `data_source`."""
    table = pq.read_table(source)
    column = table.schema.get_field_index("data_source")
    names = pa.array(["digits_right"] * len(table))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.set_column(column, "data_source", names), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
