"""The same on several processes: thresholds, budget and masks agree on all ranks without further code.

torchrun --nproc-per-node 2 launch/examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from asp_dist.pruning import Budget, Pruner, SparsityLoss

STEPS, BATCH, CLASSES = 200, 32, 10


def main() -> None:
    """Train on random prototypes with noise, on each rank others, and prune to 20 % of the weights."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)  # the same prototypes and weights on all ranks
    prototypes = torch.randn(CLASSES, 64, device=device)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CLASSES)).to(device)
    ddp_model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp_model.parameters(), lr=1e-3)
    pruner = Pruner(ddp_model, optimizer, Budget.parameters(sparsity=0.8), control=SparsityLoss())

    torch.manual_seed(1 + rank)
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), device=device)
        images = prototypes[labels] + torch.randn(BATCH, 64, device=device)
        loss = nn.functional.cross_entropy(ddp_model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    pruner.finalize()
    kept = sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)
    totals = torch.tensor([kept, -kept], device=device)
    dist.all_reduce(totals, op=dist.ReduceOp.MAX)  # the same number on all ranks?
    if rank == 0:
        print(f"done: loss {loss.item():.3f}, {kept} weights left, ranks agree: {bool(totals[0] == -totals[1])}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
