"""Parts of an experiment that settings name: algorithms, rules and others, built in, of installed packages, or any
object of one's own by `module:object`."""

from semcons_ray.parts.code import keep_code, read_code, unpack_code, use_code
from semcons_ray.parts.find import SECRET, build, check_options, names, options_of, path_of, resolve
from semcons_ray.parts.setting import STORED, PartName, part_names
from semcons_ray.parts.table import BUILT_IN, GROUPS, OFFERED, ON_WORKERS, PROTOCOLS, Kind, plural

__all__ = [
    "BUILT_IN",
    "GROUPS",
    "OFFERED",
    "ON_WORKERS",
    "PROTOCOLS",
    "SECRET",
    "STORED",
    "Kind",
    "PartName",
    "build",
    "check_options",
    "keep_code",
    "names",
    "options_of",
    "part_names",
    "path_of",
    "plural",
    "read_code",
    "resolve",
    "unpack_code",
    "use_code",
]
