"""The networks: ResNet, ResNet-KL, their blocks, and the paper's baselines."""
