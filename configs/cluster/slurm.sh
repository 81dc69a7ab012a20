#!/bin/bash
# Stage one as a SLURM job array: 16 workers with a GPU each fill one store. Any of them
# may be preempted, lost or cancelled. pipeline/labelling/engines/slurm.md has the rest.
#SBATCH --job-name=generate-labels
#SBATCH --array=0-15
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60  # a minute before the time is up, so that shards are finished
exec python cli.py generate-labels --config configs/meal_v2_resnet50.yaml --data imagenet --store labels.zarr \
    --worker auto --set store.precision=float16
