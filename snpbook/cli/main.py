"""The `snpbook` command: finds the subcommand, runs it, and keeps the contract of exit codes and messages.

Each subcommand is one module of this package with a click command of the same name (`id-block` is `id_block`),
imported only when it is asked for, so that `snpbook measure` never loads the model. Standard output carries results,
standard error one or two lines.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from snpbook import __version__
from snpbook.cli.errors import CliError, Exit
from snpbook.spec.refusal import Refusal

COMMANDS = ("demo", "doctor", "evidence", "fleet", "id-block", "kds", "lab", "measure", "report")


class Subcommands(click.Group):
    """A group whose members are the modules named in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"snpbook.cli.{name}"), name)
        return command


@click.group(
    cls=Subcommands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 input malformed, 3 evidence not genuine, 4 refused by policy, 64 usage.",
)
@click.version_option(__version__, prog_name="snpbook", message="%(prog)s %(version)s")
def snpbook() -> None:
    """An AMD EPYC server with SEV-SNP that fits in a notebook."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (by default the process's own) and return its exit code.

    Never ends in a traceback, except for unexpected errors with `SNPBOOK_DEBUG=1` in the environment.
    """
    try:
        code = snpbook.main(args=args, prog_name="snpbook", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else Exit.DONE
    except CliError as error:
        return _say(error.code, error.problem, error.remedy)
    except Refusal as refusal:
        return _say(Exit.FAILED, refusal.explain())
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "snpbook"
        return _say(Exit.USAGE, error.format_message(), f"Try '{path} --help'.")
    except click.ClickException as error:
        return _say(Exit.FAILED, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader is gone: nothing is left to flush at exit
        return Exit.FAILED
    except OSError as error:
        if os.environ.get("SNPBOOK_DEBUG"):
            raise
        return _say(Exit.FAILED, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if os.environ.get("SNPBOOK_DEBUG"):
            raise
        return _say(Exit.FAILED, f"internal error: {type(error).__name__}: {error} (SNPBOOK_DEBUG=1 shows where)")


def _say(code: Exit, problem: str, remedy: str = "") -> Exit:
    click.echo(f"snpbook: {' '.join(problem.split())}", err=True)
    if remedy:
        click.echo(f"  {' '.join(remedy.split())}", err=True)
    return code
