"""Put a context around one call of an object's method."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import update_wrapper
from typing import Any


class OneCall:
    """Takes the place of a method until it is called once, or removed; several may do so at a time.

    Args:
        owner: the object.
        name: of the method.
        context: makes the context that the call is to run in.

    Example:
        >>> from contextlib import nullcontext
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> greeter = Greeter()
        >>> _ = OneCall(greeter, "greet", nullcontext)
        >>> greeter.greet(), vars(greeter)
        ('hello', {})
    """

    def __init__(self, owner: Any, name: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._owner, self._name, self._context = owner, name, context
        self._own = vars(owner).get(name)  # most objects have the method of their class
        self._run = getattr(owner, name)
        self._done = False
        update_wrapper(self, self._run, updated=())
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method in the context, with what was there before in its place again."""
        self.remove()
        with self._context():
            return self._run(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there, as soon as nobody else has taken its place too."""
        self._done = True
        attributes: Any = vars(self._owner)
        while isinstance(call := attributes.get(self._name), OneCall) and call._done:
            if call._own is None:
                del attributes[self._name]
            else:
                attributes[self._name] = call._own
