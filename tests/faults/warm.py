"""What the server of `launches` imports before it forks: everything, by one whole sweep, so that a launcher starts at once.

That sweep is the undisturbed one which all others are compared with.
"""

import gc
import json
import os
import sys

ready = json.loads(os.environ["LORABENCH_FAULTS_WARM"])
here, saved = os.getcwd(), os.dup(2)
os.chdir(ready["cwd"])
log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 2)
sys.argv = ["lorabench", *ready["argv"]]

import lorabench.__main__ as entry  # noqa: E402

try:
    entry.main()
    code = 0
except SystemExit as e:
    code = e.code
with open("code", "w") as f:
    f.write(str(code))
os.chdir(here)
os.dup2(saved, 2)
gc.collect()
gc.freeze()  # a launcher's collections leave alone what it shares with the server, whose memory they would copy
