"""Run the command line in this process."""

from __future__ import annotations

from click.testing import CliRunner

from cli import main
from support.paths import ROOT

SMOKE = str(ROOT / "configs" / "smoke_cpu.yaml")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
