"""Sessions: `nox` runs lint, typecheck and tests; `nox -s docs` builds the site, `nox -s bench` measures speed.

`nox --no-venv` uses the environment that it is started from, whose packages are then left as they are.
"""

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "typecheck", "tests"]
nox.options.default_venv_backend = "virtualenv"


def _install(session: nox.Session, *extras: str) -> None:
    if session.venv_backend != "none":
        session.install("-e", f".[{','.join(extras)}]")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and spelling."""
    _install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types, strictly."""
    _install(session, "lint", "test")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests in two processes, each file in one of them; arguments after `--` go to pytest."""
    _install(session, "test")
    session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site into `site/`; a broken link fails."""
    _install(session, "docs")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Measure speed side by side with TRL; arguments after `--` go to the benchmark."""
    _install(session, "test")
    session.run("python", "benchmarks/step_time.py", *session.posargs)
