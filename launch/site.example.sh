# Copy to launch/site.sh and keep what your cluster needs; launch/slurm.sh reads it on the first node of each job.
# Options of sbatch (partition, account, time) go on the command line or into SBATCH_ variables of your shell
# (--mail-type=FAIL,REQUEUE tells of a job that has given up):
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=vision SBATCH_TIMELIMIT=24:00:00 SBATCH_GPUS_PER_NODE=8 SBATCH_EXCLUSIVE=1

# module load cuda/12.8                                   # what the ranks need; srun hands the environment on
# export EVACLIP_PYTHON=/shared/evaclip/.venv/bin/python  # default: .venv in the repository, else python3
# export EVACLIP_INTERFACE=ib0                            # network interface of NCCL and gloo; default: they choose
# export EVACLIP_ADDRESS={node}-ib0                       # how ranks reach the first node; default: as SLURM does
# export EVACLIP_RANKS_PER_NODE=8                         # default: GPUs of the node, else --ntasks-per-node, else 1
# export EVACLIP_NODE_PYTHON=/opt/venv/bin/python         # of the ranks, where a container has another one
# export EVACLIP_SRUN_ARGUMENTS="--container-image=/shared/evaclip.sqsh --container-mounts=/shared"  # pyxis
# export NCCL_IB_HCA=mlx5                                 # only these adapters, where others are for storage
# export WANDB_API_KEY=$(cat ~/.wandb_key)                # from a file of mode 600, never on a command line
# export WANDB_MODE=offline                               # where nodes do not reach the internet; `wandb sync` later (docs/tracking.md)
# export SCRATCH=/scratch/$USER                           # for ${SCRATCH} in paths of the configuration
