"""For the authors of passes and engines: contract suites, small real models, and engines that fail on purpose."""
