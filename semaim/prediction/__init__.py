"""Prediction of images and videos by trained models: inputs, one predictor for each kind of model, files written.

A task's `predictor` names the one that its checkpoints are read by; the command asks the task and knows no kind.
"""
