_base_ = "../_base_/pretrain.py"
