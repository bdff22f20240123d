"""topi_int8: int8 convolution and dense on CPUs, fast, through Apache TVM's own compile.

Importing it registers the tensor intrinsics and makes TVM's own compile use the strategies of this
package for LLVM CPU targets: ``tvm.compile`` where TVM has Relax, ``relay.build`` where it has
Relay (0.17 to 0.19). `disable` and `disabled` switch that off. Where only TVM's runtime is there
(``TVM_USE_RUNTIME_LIB=1``), it is `load` alone.
"""

from . import _requirements

_PAIR = _requirements.check()  # before anything imports tvm: a wrong pair would crash later

import tvm  # noqa: E402

from ._version import __version__  # noqa: E402

__all__ = ["__version__"]

if _PAIR.ffi is not None and tvm._RUNTIME_ONLY:
    from .artifact import load

    __all__ += ["load"]
else:
    from intrinsics.compat import IS_RELAX

    from . import target
    from .target import features, host_target

    if IS_RELAX:
        from .artifact import load
        from .deploy import deploy_quantized_model, quantize_model
        from .explain import explain, library_counts
        from .export import export
        from .override import disable, disabled, enable, is_enabled
        from .quantize import accuracy_report, quantize
        from .save import save
        from .transform.pipeline import pipeline

        __all__ += [
            "accuracy_report", "deploy_quantized_model", "export", "load", "pipeline", "quantize",
            "quantize_model", "save",
        ]  # fmt: skip
    else:
        from . import relay
        from .relay import disable, disabled, enable, explain, is_enabled, library_counts

        __all__ += ["relay"]

    __all__ += [
        "disable", "disabled", "enable", "explain", "features", "host_target", "is_enabled",
        "library_counts", "target",
    ]  # fmt: skip

    enable()
