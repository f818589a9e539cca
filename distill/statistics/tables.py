"""Tables of pandas from the figures of a result."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distill.errors import DistillError
from interventions import InterventionError, data_frame

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


def table_of(rows: Iterable[Mapping[Any, Any]], *index: str) -> "pandas.DataFrame":
    """Return a table with a row for each mapping of column → value; the columns `index` name the rows.

    Raises:
        DistillError: pandas is not installed.
    """
    try:
        return data_frame(rows, *index)
    except InterventionError as error:
        raise DistillError(str(error)) from error.__cause__
