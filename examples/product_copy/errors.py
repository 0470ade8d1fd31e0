"""What the demo cannot work with."""


class DemoError(Exception):
    """A wrong option, file or model: said in one line, without a traceback."""


def one_line(error: BaseException) -> str:
    """An error's message on one line; lists that other libraries set out in lines are joined."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join([lines[0], "; ".join(lines[1:])]).strip()
