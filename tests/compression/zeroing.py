"""What a pruned network must equal."""

from __future__ import annotations

import copy

import torch
from torch import nn

from basisconv_kernels.compression import prune
from basisconv_kernels.compression.prune_graph import channel_graph
from basisconv_kernels.compression.survey import survey


@torch.no_grad()
def zeroed(model, image, config):
    """The same network, nothing removed: whoever reads a channel that would go has zeros for it."""
    model = copy.deepcopy(model)
    graph = channel_graph(model, (image,))
    task = prune.Task(image, [image])
    layers = survey(model, image)
    prune._pin_excluded(graph, layers, task)
    gone = prune._chosen(graph, layers, config, prune._scores(model, graph, config, task))
    assert gone
    for member in graph.members.values():
        module = member.module
        for i, label in enumerate(member.reads):
            if graph.root(label) not in gone:
                continue
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                module.weight[:, i] = 0
            elif isinstance(module, nn.Conv2d) and module.groups < module.in_channels:
                per, outputs = module.in_channels // module.groups, module.out_channels // module.groups
                group = i // per
                module.weight[group * outputs : (group + 1) * outputs, i % per] = 0
    return model
