"""Programs that measure: ``python -m bench --help``. Figures go to ``bench/results``."""

from squid_fast.utils.threads import limit_spinning

limit_spinning()  # as the verbs do, before anything imports torch
