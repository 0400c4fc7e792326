"""The judge's program: test code, with the solution in another sandbox.

`judge` sends this file to a sandbox as text and never imports it. `host_call` is the sandbox's
built-in. The names of the solution stand for calls that go out through it and come back as plain
data, so that nothing of the solution, such as a class with its own `__eq__` or a patched built-in,
is near the assertions.
"""

import builtins


class SolutionGone(BaseException):
    """The solution has ended, or wants to. A test's `except Exception` must not catch this."""


class Unsendable(BaseException):
    """An argument is not plain data, so it cannot be sent to the solution."""


class Session:
    """Counts of the exchange: the solution's answers in one test, and all objects kept there."""

    num_answers = 0
    num_kept = 0


def ask(*request):
    """Ask the solution ("call", name, args, kwargs) or ("evaluate", expression)."""
    try:
        outcome, answer = host_call(request)
    except ValueError as problem:  # raised here, before anything was sent
        raise Unsendable(problem) from None
    Session.num_answers += 1
    if outcome == "value":
        return answer
    if outcome == "gone":
        raise SolutionGone(answer)
    name, _, text = answer.partition(": ")
    kind = getattr(builtins, name, RuntimeError)
    is_ordinary = isinstance(kind, type) and issubclass(kind, Exception)
    if not is_ordinary or issubclass(kind, StopIteration):  # it would end a test's `all(map(…))`
        kind, text = RuntimeError, answer
    try:
        problem = kind(text)
    except TypeError:  # UnicodeDecodeError and its like need more than a text
        problem = RuntimeError(answer)
    raise problem


def evaluate(expression):
    """Have the solution evaluate an expression in its namespace."""
    return ask("evaluate", expression)


class Remote:
    """A name or object of the solution. Objects stay there; this holds the path to reach them."""

    def __init__(self, path):
        vars(self)["path"] = path

    def __repr__(self):  # so that the `repr` of a list that holds one can be evaluated there
        return vars(self)["path"]

    def __call__(self, *args, **kwargs):
        path = repr(self)
        if path.rpartition(".")[2][:1].isupper():
            return keep(written_call(path, args, kwargs))
        if path.isidentifier() and not holds_remote([*args, *kwargs.values()]):
            return ask("call", path, list(args), kwargs)
        return evaluate(written_call(path, args, kwargs))

    def __getattr__(self, name):
        path = f"{self!r}.{name}"
        evaluate(f"{path} is None")  # an AttributeError belongs to the test
        return plain_or_remote(path)

    def __setattr__(self, name, value):
        evaluate(f"setattr({self!r}, {name!r}, {value!r})")


def forwarded(name):
    """Make a special method that forwards to the solution's object."""

    def method(self, *args):
        return evaluate(written_call(f"{self!r}.{name}", args, {}))

    return method


for _name in ("__len__", "__contains__", "__getitem__", "__setitem__", "__delitem__", "__str__"):
    setattr(Remote, _name, forwarded(_name))


def keep(expression):
    """Have the solution make an object and keep it. Plain data is returned as from any call."""
    Session.num_kept += 1
    path = f"_kept_{Session.num_kept}"
    evaluate(f"globals().__setitem__({path!r}, {expression})")
    return plain_or_remote(path)


def plain_or_remote(path):
    """Return the value at a path if it is plain data, else a Remote for it."""
    try:
        return evaluate(path)
    except Exception:  # it is not plain data
        return Remote(path)


def written_call(path, args, kwargs):
    """Write a call as an expression."""
    arguments = [repr(value) for value in args]
    arguments += [f"{name}={value!r}" for name, value in kwargs.items()]
    return f"{path}({', '.join(arguments)})"


def holds_remote(data):
    """Tell whether an argument holds an object of the solution at any depth."""
    if isinstance(data, dict):
        return holds_remote([*data, *data.values()])
    if isinstance(data, (list, tuple, set, frozenset)):
        return any(map(holds_remote, data))
    return isinstance(data, Remote)


def run_test(test):
    """Run one test: return if it passes, raise if it fails."""
    namespace = {"__name__": "tests", test["inside"]: evaluate}
    namespace.update({name: __import__(name) for name in test["modules"]})
    namespace.update({name: Remote(name) for name in test["names"]})
    exec(compile(test["preamble"], "<setup>", "exec"), namespace)
    if test["entry_point"]:
        namespace[test["entry_point"]] = Remote(test["entry_point"])
    exec(compile(test["source"], "<test>", "exec"), namespace)


def main():
    """Run the tests one by one, and report how each of them ended."""
    for test in host_call(("tests",)):
        if not host_call(("begin",)):
            return
        Session.num_answers = 0
        try:
            run_test(test)
            outcome = "passed"
        except SystemExit:  # a solution's comes as SolutionGone
            outcome = "unusable: it exits"
        except BaseException as problem:
            outcome = f"{type(problem).__name__}: {problem}".strip(": ")
        if not Session.num_answers:
            outcome = f"unusable: {outcome}, before it asks the solution anything"
        host_call(("ended", outcome))


if __name__ == "__main__":
    main()
