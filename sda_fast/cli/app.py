"""The application ``sda-fast``: its exit codes, and the arguments that several commands take.

Results (paths, or JSON) go to stdout, one a line; words for people and progress go to stderr.
Exit codes: 0 all done; 1 the work failed; 2 bad input or usage.
"""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sda_fast.cli.terminal import stderr_console

FAILED, BAD_INPUT = 1, 2
BAD_INPUTS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
FAILURES = (OSError, NotImplementedError, MemoryError, FloatingPointError)


class _Commands(TyperGroup):
    """Turns expected errors into one line on stderr and an exit code; the rest is a bug."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except BAD_INPUTS as error:
            _give_up(error, BAD_INPUT)
        except FAILURES as error:
            _give_up(error, FAILED)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; it may not be imported
                raise
            _give_up(error, FAILED)


app = typer.Typer(
    cls=_Commands,
    help="Pictures as short, editable embeddings for a frozen FLUX, and pictures again.",
    epilog="Exit codes: 0 all done, 1 the work failed, 2 bad input or usage. "
    "Results go to stdout, one a line; messages and progress to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of ``sda-fast``."""
    app()


Pictures = Annotated[list[Path], typer.Argument(metavar="PICTURE", show_default=False)]
Model = Annotated[str, typer.Option(help='"scenes" comes with the package; or a pipeline folder.')]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results, made if needed.")]
Side = Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the model's")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps.", show_default="the model's")
]
Guidance = Annotated[
    float | None, typer.Option(help="Scale of the guidance.", show_default="the model's")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise.")]
Rule = Annotated[str, typer.Option(help="Mask rule: overlap, local or isolated.")]
Nodes = Annotated[
    list[str] | None,
    typer.Option("--node", help="Change this node alone, such as /1; may be repeated."),
]


def _give_up(error: BaseException, code: int) -> NoReturn:
    from rich.markup import escape

    words = escape(str(error) or type(error).__name__)
    stderr_console().print(f"[bold red]error:[/] {words}", soft_wrap=True)
    raise typer.Exit(code)
