"""Pickled lists of names, read without running what is in them."""

import io
import pickle
from typing import Any, NoReturn

from upreid_ray.config.errors import InputError, first_line


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of lists, tuples, dictionaries, numbers, text and bytes alone."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(content: bytes, source: str) -> Any:  # noqa: ANN401, whatever was pickled
    """Return what was pickled if it is plain data.

    Raises:
        InputError: It is damaged, or asks for a class or function, which could run code.
    """
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        raise InputError(
            f"{source}: cannot be read as pickled plain data ({first_line(error)})"
        ) from error
