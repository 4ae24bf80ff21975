"""On PYTHONPATH: the processor claims matrix units for bf16, so that ``dist.precision: auto`` takes
bf16 on any machine. Slower without them, but of the same results.
"""

import importlib.abc
import importlib.machinery
import sys


class _Claims(importlib.abc.MetaPathFinder):
    """``torch.cpu`` as it is, but for what it says of the processor; imported when it is asked."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            found = module.get_capabilities
            module.get_capabilities = lambda: {**found(), "amx_bf16": True}

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Claims())
