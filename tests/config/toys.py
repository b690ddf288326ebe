"""A small training config."""


def toy_config(**lightning):
    return {
        "model": {"base_learning_rate": 1e-3, "target": "tests.toys.Toy", "params": {"width": 3}},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 2, "train": {"target": "tests.toys.Images"}},
        },
        "lightning": lightning,
    }
