"""Commands whose processes may be the ranks of a launcher: what one of them refuses ends all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from dwdp.cli.main import EXIT_BAD_INPUT, describe_error
from dwdp.group import fail_before_joining
from dwdp.launch import LaunchError, discover_launch


@contextmanager
def peers_hear_of_refusals() -> Iterator[None]:
    """If this process is one of a launcher's ranks, what it refuses here ends the others too."""
    try:
        yield
    except (click.UsageError, ValueError) as error:
        with suppress(LaunchError):
            launch = discover_launch()
            if launch is not None:
                fail_before_joining(launch, describe_error(error)[0], bad_input=True)
        raise


class RankCommand(click.Command):
    """A command whose processes may be the ranks of a launcher."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with peers_hear_of_refusals():
            return super().parse_args(ctx, args)


@contextmanager
def bad_input_is_a_value_error() -> Iterator[None]:
    """So that peers judge an error as this rank's exit code does (a path that is not there, say)."""
    try:
        yield
    except Exception as error:
        text, exit_code = describe_error(error)
        if exit_code == EXIT_BAD_INPUT and not isinstance(error, ValueError):
            raise ValueError(text) from error
        raise
