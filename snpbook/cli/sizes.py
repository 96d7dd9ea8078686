"""Memory sizes as people write them: `512M`, `2G`, `512 MiB`. Units are powers of two; a size is whole pages."""

import click

from snpbook.spec.sizes import parse_size


class Size(click.ParamType[int]):
    """A click type: a number of bytes that is a positive whole number of 4 KB pages, else a usage error."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
