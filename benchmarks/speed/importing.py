"""How long an import takes in an empty process: `importing.py MODULE DISTRIBUTION`, printed as JSON."""

import sys
import time

start, cpu = time.perf_counter(), time.process_time()
__import__(sys.argv[1])
ms, cpu_s = 1e3 * (time.perf_counter() - start), time.process_time() - cpu

import json  # noqa: E402  (after the clock has stopped)
import resource  # noqa: E402
from importlib.metadata import version  # noqa: E402

peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
versions = {"version": version(sys.argv[2]), "torch": version("torch")}
print(json.dumps({"ms": ms, "cpu_s": cpu_s, "peak_mb": peak_mb} | versions))
