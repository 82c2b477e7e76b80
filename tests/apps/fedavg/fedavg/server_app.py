"""The ServerApp."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from .task import Net, load_all, test

app = ServerApp()


class OrderedFedAvg(FedAvg):
    """FedAvg that adds up in the order of the losses: replies come in any, and so would the last bits of the sums."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies."""
        return super().aggregate_train(server_round, sorted(replies, key=_loss))


def _loss(reply: Message) -> float:
    return -1.0 if reply.has_error() else float(reply.content.metric_records["metrics"]["train_loss"])  # type: ignore[arg-type]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg, and save what came out."""
    torch.manual_seed(1)
    nodes = int(context.run_config["nodes"])
    strategy = OrderedFedAvg(
        fraction_train=float(context.run_config["fraction-train"]),
        fraction_evaluate=float(context.run_config["fraction-evaluate"]),
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes,
        min_available_nodes=nodes,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": float(context.run_config["learning-rate"])}),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=global_evaluate,
    )
    path = Path(str(context.run_config["model-path"]))
    save_file(result.arrays.to_torch_state_dict(), path)
    metrics = {number: dict(record) for number, record in result.evaluate_metrics_serverapp.items()}
    path.with_suffix(".json").write_text(json.dumps(metrics))


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the model on data that no client has."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, load_all()[1])
    return MetricRecord({"accuracy": accuracy, "loss": loss})
