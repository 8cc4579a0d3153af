# 36 epochs: as detection_1x.py, a tenth of the rate after 27 and after 33.
_base_ = 'detection_1x.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=36, milestones=[27, 33])
train_cfg = dict(max_epochs=36)
