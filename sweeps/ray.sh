#!/bin/sh
# A sweep on Ray: each pack a task. Of the cluster that RAY_ADDRESS names, or that runs on this machine, or else of one
# that is made here for the time of the sweep.
#
#     sh sweeps/ray.sh                                                  the rank sweep
#     RAY_ADDRESS=10.0.0.7:6379 sh sweeps/ray.sh +experiment=variants hydra.launcher.gpus_per_node=1
#
# Words after the file are lorabench's (conf/hydra/launcher/ray.yaml has the tasks'). Run it where `sweeps/` shall be, on a
# disk that all nodes see, with `pip install 'lorabench[ray]'` on each. Stopped, its tasks end with it: the same words
# again go on from their checkpoints.
set -eu
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python}
[ $# -gt 0 ] || set -- +experiment=rank_sweep
address=null
if [ -n "${RAY_ADDRESS:-}" ]; then
  address=$RAY_ADDRESS
elif "$PYTHON" -m ray.scripts.scripts status >/dev/null 2>&1; then
  address=auto
fi
exec "$PYTHON" -m lorabench "$@" hydra/launcher=ray "hydra.launcher.address=$address"
