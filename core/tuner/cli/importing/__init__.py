"""Configs of other tools become ours. Facts about their keys are data in one module for each tool."""
