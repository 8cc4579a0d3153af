"""What the tools need to build and run models: configs, Runners, inference."""
