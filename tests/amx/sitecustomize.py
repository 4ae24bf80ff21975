"""On PYTHONPATH: the processor claims matrix units for bf16, so that ``dist.precision: auto`` takes
bf16 on any machine. Slower without them, but of the same results.
"""

import pathlib

_read_text = pathlib.Path.read_text


def read_text(path: pathlib.Path, *args, **kwargs) -> str:
    text = _read_text(path, *args, **kwargs)
    if str(path) != "/proc/cpuinfo":
        return text
    return text.replace("flags\t\t:", "flags\t\t: amx_bf16")


pathlib.Path.read_text = read_text
