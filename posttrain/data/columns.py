"""Columns in memory to a `datasets.Dataset` in memory: nothing is written to a cache."""

from typing import Any

from posttrain.errors import DataError

TOKEN_COLUMNS = {"input_ids", "prompt_ids", "chosen_ids", "rejected_ids"}


def as_ids(ids: list[int]) -> Any:
    """Token ids in 4 bytes each, a tenth of what a list of Python numbers takes."""
    import numpy

    return numpy.asarray(ids, dtype=numpy.int32)


def as_bools(values: list[bool]) -> Any:
    import numpy

    return numpy.asarray(values, dtype=bool)


def to_dataset(columns: dict[str, list[Any]]):
    """Token ids are held as int32 and masks as bool; other columns as Arrow finds them.

    Raises DataError naming the column whose values have no common type.
    """
    import datasets
    import pyarrow

    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values, type=_arrow_type(name))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(
                f"column '{name}': its rows hold different types ({error}). Give every row the "
                "same type, or remove the column."
            ) from None
    return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(arrays)))


def _arrow_type(name: str) -> Any:
    import pyarrow

    if name in TOKEN_COLUMNS:
        return pyarrow.list_(pyarrow.int32())
    return pyarrow.list_(pyarrow.bool_()) if name == "trained" else None
