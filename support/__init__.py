"""What serves the concepts at the top: pictures, checkpoints, log, command line, processes."""
import os

# Before torch is loaded: its threads spin while they wait, unless the user says otherwise, and take
# three times as long on a machine with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
