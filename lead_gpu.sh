set -u
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
W=/tmp/w; mkdir -p $W
T0=$(date +%s); say() { echo "== $(( $(date +%s) - T0 )) s: $*" | tee -a $OUT/log.txt; }
common() { echo "--engine torch --model_id examples/llama3_8b_128k --plan_ngpus 8 --runtime_ngpus 8 --sequence_length $1 --compiled_dir $W --name L$1"; }
for n in 131072 32768 8192; do timeout 40 python3 train.py --run_mode compile $(common $n) > $W/c$n.txt 2>&1 & done; wait
say compiled; tail -3 $W/c131072.txt
lim=80
for n in 131072 32768 8192; do
  timeout $lim python3 train.py --run_mode rehearse $(common $n) > $W/r$n.txt 2>&1; rc=$?
  say rehearsed $n rc $rc; grep -v "it/s\|micro-batch\]" $W/r$n.txt | tail -6 | cut -c1-600
  cp $W/L$n/rehearsal.json $OUT/rehearsal_$n.json; cp $W/L$n/rehearsal.md $OUT/rehearsal_$n.md; lim=35
done
(timeout 70 python3 - > $W/resume.txt 2>&1 <<'PY'
import sys; sys.path.insert(0, ".")
from benchmarks.gpu_parts.__main__ import make
from benchmarks.gpu_parts.training import training_measurements
class W:
    def writelines(self, x):
        for y in x: print("ROW", y, flush=True)
    def flush(self): pass
make((m for m in training_measurements(False) if "kill" in m[0]), W())
PY
grep "ROW\|Error" $W/resume.txt | cut -c1-400) > $W/resume_rows.txt &
timeout 88 python3 -m pytest -m gpu tests -q -p no:cacheprovider --maxfail=25 --durations=5 > $OUT/pytest.txt 2>&1; say pytest rc $?
wait; cat $W/resume_rows.txt | tee -a $OUT/log.txt; grep -n "^FAILED\|^ERROR\|passed\|failed" $OUT/pytest.txt | cut -c1-300 | tail -30
(cd $W && tar czf $OUT/txt.tgz *.txt)
