"""Models: transformers' own, on our attention.

transformers is loaded here, before any file of this folder, of the engine and of the trainer: it loads torchao if that
is installed, which warns about its parts for other machines and, through torch, about torch.
"""

import logging

_loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
_levels = [logger.level for logger in _loggers]
for _logger in _loggers:
    _logger.setLevel(logging.ERROR)
try:
    import transformers.modeling_utils  # noqa: F401
finally:
    for _logger, _level in zip(_loggers, _levels, strict=True):
        _logger.setLevel(_level)
