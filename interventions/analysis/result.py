"""`Result`, the common class of all results: they print, show in notebooks, draw themselves and become plain data."""

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from html import escape
from math import isfinite, nan
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interventions.errors import InterventionError
from interventions.names import printable

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

    from interventions.analysis.plots import Picture


class Result(ABC):
    """A result of a measurement or a training.

    `print(result)` shows its figures as text, a notebook shows picture and text, `plot` draws it, `to_dict` and
    `to_pandas` give its figures as plain data and as a table.
    """

    @abstractmethod
    def plot(self) -> "Picture":
        """Draw the result as a matplotlib figure, which is not registered with pyplot.

        Raises:
            ValueError: nothing was measured that could be drawn (the error type of the package, which says what).
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data that JSON has a form for; None stands where there is no number."""

    @abstractmethod
    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures as a table.

        Raises:
            ValueError: pandas is not installed (the error type of the package).
        """

    def _repr_html_(self) -> str:
        try:
            picture = base64.b64encode(self.plot()._repr_png_()).decode()
        except ValueError as nothing:
            shown = f"<p>{escape(printable(nothing))}</p>"
        else:
            shown = f'<img src="data:image/png;base64,{picture}">'
        return f"{shown}<pre>{escape(str(self))}</pre>"


def data_frame(rows: Iterable[Mapping[Any, Any]], *index: str) -> "pandas.DataFrame":
    """Return a table of pandas with a row for each mapping of column → value; the columns `index` name the rows.

    Raises:
        InterventionError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise InterventionError("to_pandas needs pandas, which is not installed: pip install pandas.") from error
    table = pandas.DataFrame([{key: nan if each is None else each for key, each in row.items()} for row in rows])
    return table.set_index(list(index)) if len(table) else table


def plain_data(value: Any) -> Any:
    """Return numbers, tensors and their containers as JSON has them: lists, text keys, None for NaN and ±inf.

    What JSON has no form for is written as text.

    >>> import torch
    >>> plain_data({"values": torch.tensor([1.0, float("nan")]), 2: (True, None)})
    {'values': [1.0, None], '2': [True, None]}
    """
    if isinstance(value, Tensor):
        return plain_data(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain_data(each) for key, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain_data(each) for each in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
