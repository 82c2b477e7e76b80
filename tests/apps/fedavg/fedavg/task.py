"""Model, data and training: plain PyTorch."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)  # sums come out in another order, and so with other last bits, with more


class Net(nn.Module):
    """A small CNN for pictures of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features = functional.max_pool2d(functional.relu(self.conv(pictures)), 2)
        logits: torch.Tensor = self.fc(features.flatten(1))
        return logits


def load_all() -> tuple[TensorDataset, TensorDataset]:
    """Return the pictures to train on, and those to test with."""
    pictures, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pictures, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    targets = torch.tensor(labels, dtype=torch.int64)
    return TensorDataset(inputs[:1500], targets[:1500]), TensorDataset(inputs[1500:], targets[1500:])


def load_data(partition_id: int, num_partitions: int) -> tuple[TensorDataset, TensorDataset]:
    """Return a partition: four fifths to train on, one to evaluate with."""
    inputs, targets = (tensor[partition_id::num_partitions] for tensor in load_all()[0].tensors)
    split = len(targets) * 4 // 5
    return TensorDataset(inputs[:split], targets[:split]), TensorDataset(inputs[split:], targets[split:])


def train(net: nn.Module, data: TensorDataset, epochs: int, batch_size: int, lr: float, seed: int) -> float:
    """Train and return the mean loss; the seed decides the order of the batches."""
    loader = DataLoader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for pictures, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(pictures), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


@torch.no_grad()
def test(net: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return loss and accuracy."""
    net.eval()
    pictures, labels = data.tensors
    logits = net(pictures)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return functional.cross_entropy(logits, labels).item(), accuracy.item()
