"""Commands whose options of one value are given once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperOption

from qconvert.errors import UsageError


class OnceCommand(TyperCommand):
    """A command that refuses an option which is given twice and has room for one value.

    The parser would take the last without a word: a script that adds options to a line of options
    would run with another scheme than its reader sees.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, as the class above does.

        Raises:
            UsageError: an option of one value is given more than once.
        """
        if not ctx.resilient_parsing:  # which completes a line that is not finished
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter, count in Counter(order).items():
                takes_one = isinstance(parameter, TyperOption) and not (
                    parameter.multiple or parameter.is_flag or parameter.count
                )
                if takes_one and count > 1:
                    name = max(parameter.opts, key=len)
                    raise UsageError(
                        f"{name} is given {count} times",
                        wanted="once: it takes one value",
                        hint=f"leave all but one {name} away",
                    )
        return super().parse_args(ctx, args)
