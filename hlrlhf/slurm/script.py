"""Settings to the text of a batch script; no side effects beyond reading templates.

Nothing reaches the script unquoted by accident: an expression in a template has to end in one of
the filters below, or rendering fails. They return `Markup`, which is only Jinja's word for "this
text is already right where it stands"; no HTML is involved.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.bccache
from markupsafe import Markup

from hlrlhf import __version__
from hlrlhf.settings import paths
from hlrlhf.settings.errors import Problem, SettingsError
from hlrlhf.settings.layers import Resolved
from hlrlhf.settings.schema import Settings

SEARCH_PATH = "HLRLHF_TEMPLATE_PATH"
BASE = "job.sbatch.j2"

# All of them but the tab, which a line of the site's own may hold.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# Linux starts no program with an argument or a variable of 128 KiB; its name has to fit in, too.
_LONGEST_WORD = 2**17 - 100


def render(resolved: Resolved, run_directory: Path, environ: Mapping[str, str]) -> str:
    """The batch script of a run.

    Args:
        resolved: the run's settings.
        run_directory: absolute; its last part is the run's name. It need not exist.
        environ: the environment, of which HLRLHF_TEMPLATE_PATH is read.

    Raises:
        SettingsError: a template cannot be found or does not render, or a value cannot be
            written into a script.
    """
    settings = resolved.settings
    template = settings.slurm.template or BASE
    try:
        return (
            _environment(template, environ)
            .get_template(template)
            .render(
                settings=settings,
                run_name=run_directory.name,
                run_directory=str(run_directory),
                gres=_gres(settings),
                mounts=_mounts(resolved, run_directory),
                outputs=_outputs(resolved),
                port_is_set=not resolved.is_default("master_port"),
            )
        )
    except jinja2.TemplateNotFound as error:
        folders = f"the folders of {SEARCH_PATH}, and ours"
        problem = Problem(f"slurm.template = {template!r}", f"no {error.name!r} in {folders}")
    except jinja2.TemplateSyntaxError as error:
        where = f"{error.filename or error.name}:{error.lineno}"
        problem = Problem(f"template {where}", error.message or "syntax error")
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        problem = Problem(f"template {_place(error, template)}", str(error))
    except RecursionError:
        problem = Problem(f"template {template}", "extends or includes itself")
    raise SettingsError([problem])


def _environment(template: str, environ: Mapping[str, str]) -> jinja2.Environment:
    folders = [part for part in environ.get(SEARCH_PATH, "").split(os.pathsep) if part]
    loader = jinja2.ChoiceLoader(
        [
            jinja2.FunctionLoader(_file_at(template)),
            jinja2.FileSystemLoader([*folders, str(resources.files("hlrlhf.templates"))]),
        ]
    )
    jinja = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        # With autoescape, `super()` and macros yield Markup, as our filters do.
        autoescape=True,
        finalize=_finalize,
        bytecode_cache=_Cache(str(_cache_folder(environ))),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters.update(shell=shell, sbatch=sbatch, verbatim=verbatim, log_pattern=log_pattern)
    return jinja


class _Cache(jinja2.FileSystemBytecodeCache):
    """Compiled templates, by their text; compiling them is a third of the time of a render."""

    # Where nothing can be read or written, there is no cache.

    def load_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        with contextlib.suppress(OSError):
            super().load_bytecode(bucket)

    def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        with contextlib.suppress(OSError):
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            super().dump_bytecode(bucket)


def _cache_folder(environ: Mapping[str, str]) -> Path:
    cache = environ.get("XDG_CACHE_HOME", "")
    if not cache.startswith("/"):
        cache = str(Path(environ.get("HOME") or Path.home()) / ".cache")
    # What a template compiles to depends on how it is set up here.
    return Path(cache, "hlrlhf", f"templates-{__version__}")


def _file_at(template: str) -> Callable[[str], tuple[str, str, Callable[[], bool]] | None]:
    """A loader of the one template that is given as a path.

    It is known by its path alone, so that a file called like ours can still extend ours.
    """

    def load(name: str) -> tuple[str, str, Callable[[], bool]] | None:
        if name != template or os.sep not in name:
            return None
        try:
            return Path(name).read_text(encoding="utf-8"), name, lambda: True
        except (OSError, UnicodeDecodeError):
            return None

    return load


def _finalize(value: Any) -> Any:
    """Let through what a filter has quoted, and whole numbers; refuse the rest."""
    if isinstance(value, Markup | jinja2.Undefined):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Markup(value)  # noqa: S704 - digits
    raise ValueError(f"{value!r} is not quoted; end the expression in |shell, |sbatch or |verbatim")


def _plain(value: object) -> str:
    text = str(value)  # raises what it should for an undefined value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is neither text nor a number")
    if _CONTROL.search(text):
        raise ValueError(f"{text!r} holds a control character, which a script cannot")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is not UTF-8") from error
    return text


def shell(value: object) -> Markup:
    """A value as one word of bash."""
    text = _plain(value)
    if len(text.encode()) > _LONGEST_WORD:
        raise ValueError(f"{text!r} is longer than an argument of a program can be")
    return Markup(shlex.quote(text))  # noqa: S704 - quoted


def sbatch(value: object) -> Markup:
    """A value as one word of an #SBATCH line.

    Slurm's reader of those lines resembles a shell, except that a backslash escapes the next
    character even between single quotes.
    """
    return Markup(shlex.quote(_plain(value).replace("\\", "\\\\")))  # noqa: S704 - quoted


def verbatim(value: object) -> Markup:
    """A line that a site wrote itself, as it stands, if it is one line."""
    return Markup(_plain(value))  # noqa: S704 - meant as it is


def log_pattern(value: object) -> str:
    """A folder as the beginning of a pattern for --output; still to be quoted.

    A percent sign starts a replacement there, and a backslash switches all replacements off.
    """
    path = _plain(value)
    if "\\" in path:
        raise ValueError(f"{path!r}: Slurm cannot name logs in a path with a backslash")
    return path.replace("%", "%%")


def _place(error: BaseException, template: str) -> str:
    """``file:line`` of the template that `error` comes from, as far as the traceback tells."""
    place = template
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file == template or file.endswith(".j2"):
            place = f"{file}:{line}"
    return place


def _gres(settings: Settings) -> str | None:
    """``name[:type]:count`` for --gres, or None."""
    parts = [settings.gres_name, settings.slurm.gres_type, str(settings.devices_per_node)]
    return ":".join(part for part in parts if part) if settings.gres_name else None


def _mounted(resolved: Resolved) -> Iterator[tuple[str, str]]:
    """The paths that a container gets besides the run's directory, each with its setting."""
    mounted = {name for name, place in paths.places().items() if place.mounted}
    return paths.among(resolved.values, mounted)


def _outputs(resolved: Resolved) -> list[str]:
    """Those of them that the run makes, and that need not be there yet."""
    places = paths.places()
    return [path for name, path in _mounted(resolved) if places[name].kind == "output"]


def _mounts(resolved: Resolved, run_directory: Path) -> list[str]:
    """``source:target`` of all that a container has to see, each under its own path.

    Raises:
        SettingsError: a path holds a character that separates mounts.
    """
    if resolved.settings.container.kind == "none":
        return []
    named = [("base_out_path", str(run_directory)), *_mounted(resolved)]
    problems = [
        Problem(f"{name} = {path!r}", "a container cannot mount a path with a colon or a comma")
        for name, path in named
        if re.search("[:,]", path)
    ]
    if problems:
        raise SettingsError(problems)
    sources = dict.fromkeys(path for _, path in named)
    return [f"{path}:{path}" for path in sources] + resolved.settings.container.mounts
