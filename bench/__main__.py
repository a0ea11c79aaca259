"""``python -m bench SUITE [options]``: run one suite, or write the README's tables anew."""

import sys
from importlib import import_module

import typer

SUITES = {
    "attention": "joint attention under the hierarchy: time and memory against its competitors",
    "claims": "the claims of the work, each with a verdict, by adapters trained for it",
    "edit": "unseen scenes edited by words, judged exactly, beside other ways to edit",
    "edit-speed": "embedding and instruction to embedding: time of each mode of the editor",
    "encode": "picture to embedding with encoders of full size: time of each stage",
    "flux": "steps of a full-size FLUX: FastFlux and diffusers, lever by lever",
    "flux-train": "forward and gradient of the embedding through a frozen full-size FLUX",
    "gate": "every tile compiled for sm_90a, without a GPU: registers, spills, instructions",
    "qformer": "rotated attention and the adapter: time and memory against their competitors",
    "quality": "how well the shipped model rebuilds unseen scenes",
    "report": "write the README's tables and pictures from bench/results",
    "scaling": "ranks on the CPU: bytes sent a step, and what of the all-reduce is hidden",
    "training": "whole training steps of full size against stock diffusers; the trainer's waits",
    "tune": "tiles of the attention kernels: which is right and the fastest",
}
"""Modules of bench (``-`` is ``_``) that have a ``main``; a suite is imported when it runs."""


def main(arguments: list[str]) -> None:
    """Hand the arguments after the suite's name to its ``main``; exits with its status."""
    if not arguments or arguments[0] not in SUITES:
        print("usage: python -m bench SUITE [--help]\n")
        for name, what in SUITES.items():
            print(f"  {name:10} {what}")
        sys.exit(0 if arguments in (["--help"], ["-h"]) else 2)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(import_module(f"bench.{arguments[0].replace('-', '_')}").main)
    app(arguments[1:], prog_name=f"python -m bench {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
