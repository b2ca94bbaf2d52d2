"""hasten: from a trained model to a proven, faster one."""
