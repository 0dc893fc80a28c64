"""The method in plain PyTorch and torchvision: one process, no Ray, no MLflow."""
