"""The yacs tree's keys and defaults: those of InternVL's ``classification/config.py``.

Keys that only this package has are marked ``(new)``.
"""

from __future__ import annotations

from yacs.config import CfgNode as CN

DEFAULTS = _C = CN()
_C.BASE = ['']  # YAML files that this one is merged onto, relative to it

_C.DATA = CN()
_C.DATA.BATCH_SIZE = 128  # images per rank and micro-batch
# Holds train/ and val/; of a variant its class folders; with ZIP_MODE see there.
_C.DATA.DATA_PATH = ''
# 'imagenet' (any image folder, list or zip file of classes), imagenet22K (training images in
# DATA_PATH/train or DATA_PATH itself), imagenet-real (ReaL's labels); to evaluate only:
# imagenetv2, imagenet_a, imagenet_r, imagenet_sketch. (new) folder (as imagenet), tar, wds
# (WebDataset's shards), csv and jsonl (tables of path and label), hfds (a data set of Hugging
# Face's that DATA_PATH holds) and hfds/NAME; see docs/data.md.
_C.DATA.DATASET = 'imagenet'
_C.DATA.IMG_SIZE = 224  # pixels
# Of resizing: random, nearest, bilinear, bicubic, box, hamming, lanczos;
# build_transform_for_linear_probe takes bicubic always.
_C.DATA.INTERPOLATION = 'bicubic'
# Read DATA_PATH/train.zip and val.zip, or train/ and val/ below folder F of one file where
# DATA_PATH is 'x.zip@/F'; labels come from class folders in it, or from lists: train_map.txt
# beside it, or as META_DATA says.
_C.DATA.ZIP_MODE = False
# Of zip files: no; part: each rank keeps its share in memory and trains on that alone, so that
# over all ranks an epoch has every image once; full: each rank keeps all.
_C.DATA.CACHE_MODE = 'part'
# Copy batches to the GPU from pinned memory; without a GPU it has no effect.
_C.DATA.PIN_MEMORY = True
# Processes of a rank that read images; 0: the rank itself.
_C.DATA.NUM_WORKERS = 8
# (new) Keep the processes that read training images from epoch to epoch: their start is spared, and
# their memory is taken during evaluation too. Images, order and random numbers are the same.
_C.DATA.PERSISTENT_WORKERS = False
_C.DATA.WORKER_TIMEOUT = 30  # seconds for the workers of an epoch to begin; then others start
# Each rank keeps its share of the encoded training images in memory and trains on that alone, as
# with CACHE_MODE part.
_C.DATA.IMG_ON_MEMORY = False
# (new) Folder of the lists train.txt and val.txt (lines `path label`); '' looks for meta_data/ in
# DATA_PATH and, where a split has no class folders, beside DATA_PATH and where the program starts.
# Of the tables of csv and jsonl '' is DATA_PATH.
_C.DATA.META_DATA = ''
# (new) 'package.module:function', called with the config and 'train' or 'val'; what it returns has
# a length and items (image, label). It takes the place of DATASET and DATA_PATH.
_C.DATA.FACTORY = ''
# (new) Images have several labels or none: wds, csv, jsonl, hfds and FACTORY give lists of them.
_C.DATA.MULTI_LABEL = False
# (new) How much an image counts in the training loss, by its class: a list of numbers by label, or
# 'balanced', which takes them from the numbers of training images; None: all the same.
_C.DATA.CLASS_WEIGHTS = None
# (new) JSON of ReaL's labels for 'imagenet-real'; '' takes those that timm ships.
_C.DATA.REAL_LABELS = ''
# (new) Refuse weights that keep names of other classes, by label, than the folders of now have.
_C.DATA.CHECK_CLASS_NAMES = True
# (new) What a training image that cannot be read or decoded does: 'stop' ends the run; 'skip' takes
# another, the same in every run, and names it in the log. Evaluation always stops.
_C.DATA.ON_ERROR = 'stop'
# (new) Share of the training images that 'skip' may replace; beyond it the run ends.
_C.DATA.MAX_SKIPPED = 0.01
# (new) Turn images as their EXIF orientation says; None: as the original, which reads them through
# OpenCV (turned), and imagenetv2, imagenet_a, imagenet_r and imagenet_sketch through PIL (not).
_C.DATA.EXIF_ROTATE = None
# (new) Repeated augmentation: an epoch's order has each image so many times in a row, augmented
# anew and on as many ranks, as timm's RepeatAugSampler; an epoch has as many images as before, so
# it sees a part of the data set. 0 and 1: none.
_C.DATA.REPEATED_AUG = 0
_C.DATA.TRANSFORM = 'build_transform'  # or 'build_transform_for_linear_probe'

_C.MODEL = CN()
_C.MODEL.TYPE = 'intern_vit_6b'  # 'timm' builds MODEL.NAME through timm
# The name that timm has for the model; with another MODEL.TYPE only what logs call it.
_C.MODEL.NAME = 'intern_vit_6b'
_C.MODEL.FACTORY = ''  # (new) 'package.module:function', called with the config; wins over TYPE
_C.MODEL.KWARGS = CN(new_allowed=True)  # (new) further keyword arguments for timm.create_model
# Weights to start from: a tag, .pth, .safetensors, https or Hugging Face Hub address, or 'timm',
# those that timm has for the model; not read where MODEL.RESUME is found.
_C.MODEL.PRETRAINED = ''
_C.MODEL.PRETRAINED_KEY = ''  # (new) the entry of a file to take, as 'teacher'; '': the first known
_C.MODEL.PRETRAINED_EMA = False  # (new) take the averaged weights of a tag or a checkpoint
_C.MODEL.PRETRAINED_RENAME = []  # (new) pairs of a regular expression and its replacement
# (new) Share of the model's parameters that must be in the checkpoint.
_C.MODEL.PRETRAINED_MIN_MATCH = 0.5
_C.MODEL.PRETRAINED_READERS = 'all'  # (new) or 'one': rank 0 reads, the others receive
_C.MODEL.RESUME = ''  # checkpoint to go on from, or to evaluate
# (new) Seconds within which a download of PRETRAINED or RESUME must bring 64 KiB more (10 MiB from
# the Hugging Face Hub), or its rest.
_C.MODEL.DOWNLOAD_TIMEOUT = 120
# Of the head; the data must have as many. 0: as many as the training images have, in an evaluation
# those of val; a tag or a file of weights must have the same number then.
_C.MODEL.NUM_CLASSES = 1000
# (new) Have the batch norms of the model (torch's and timm's) see the images of all ranks.
_C.MODEL.SYNC_BN = False
_C.MODEL.DROP_RATE = 0.0  # of dropout before the head, where the model has it
_C.MODEL.DROP_PATH_RATE = 0.1  # of stochastic depth in the last block, where the model has it
# 'linear': the rate rises from 0 over the blocks; another is refused but for a MODEL.FACTORY, which
# reads it itself.
_C.MODEL.DROP_PATH_TYPE = 'linear'
_C.MODEL.LABEL_SMOOTHING = 0.1  # of the training loss; evaluation has none

_C.MODEL.INTERN_VIT_6B = CN()
_C.MODEL.INTERN_VIT_6B.PATCH_SIZE = 14  # pixels
_C.MODEL.INTERN_VIT_6B.PRETRAIN_SIZE = 224  # pixels: of the images that PRETRAINED was trained on
_C.MODEL.INTERN_VIT_6B.QKV_BIAS = False  # of the projection to q, k and v
_C.MODEL.INTERN_VIT_6B.EMBED_DIM = 3200  # width
_C.MODEL.INTERN_VIT_6B.NUM_HEADS = 25  # of attention, in each block
_C.MODEL.INTERN_VIT_6B.MLP_RATIO = 4  # hidden width of the MLPs, in widths
_C.MODEL.INTERN_VIT_6B.INIT_VALUES = 0.1  # of the layer scales; 0 or None: none
_C.MODEL.INTERN_VIT_6B.QK_NORMALIZATION = True  # over the width, all heads together
_C.MODEL.INTERN_VIT_6B.DEPTH = 48  # blocks
_C.MODEL.INTERN_VIT_6B.USE_FLASH_ATTN = True  # either way torch's scaled_dot_product_attention
_C.MODEL.INTERN_VIT_6B.FREEZE_VIT = True  # train the head alone, its batch norm with it
# Weights of the backbone: a .pth, or a directory, file or hub address of the Hugging Face naming.
_C.MODEL.INTERN_VIT_6B.PRETRAINED = None
# cls_patch_concat, attention_pooling, clip_projector
_C.MODEL.INTERN_VIT_6B.CLS_TARGET = 'cls_patch_concat'
_C.MODEL.INTERN_VIT_6B.NORM_TYPE = 'rms'  # rms, ln

_C.MODEL.CLIP_VIT = CN()
_C.MODEL.CLIP_VIT.PATCH_SIZE = 14  # pixels
_C.MODEL.CLIP_VIT.PRETRAIN_SIZE = 336  # pixels: of the images that PRETRAINED was trained on
_C.MODEL.CLIP_VIT.EMBED_DIM = 1024  # width
_C.MODEL.CLIP_VIT.NUM_HEADS = 16  # of attention, in each block
_C.MODEL.CLIP_VIT.MLP_RATIO = 4  # hidden width of the MLPs, in widths
_C.MODEL.CLIP_VIT.DEPTH = 24  # blocks
_C.MODEL.CLIP_VIT.FREEZE_VIT = True  # train the head alone, its batch norm with it
_C.MODEL.CLIP_VIT.PRETRAINED = 'openai/clip-vit-large-patch14-336'  # or a path; '': random
_C.MODEL.CLIP_VIT.CLS_TARGET = 'cls_patch_concat'  # or attention_pooling

_C.TRAIN = CN()
_C.TRAIN.START_EPOCH = 0  # the first epoch; a resume sets it
_C.TRAIN.EPOCHS = 300  # at which the run and its schedule end
_C.TRAIN.WARMUP_EPOCHS = 20  # over which the lr rises from WARMUP_LR
_C.TRAIN.WEIGHT_DECAY = 0.05  # of weights of two and more dimensions that the model does not exempt
_C.TRAIN.BASE_LR = 5e-4  # for a batch of 512; the training program scales it linearly
_C.TRAIN.WARMUP_LR = 5e-7  # at the first update; scaled as BASE_LR
_C.TRAIN.MIN_LR = 5e-6  # at the end of the cosine; scaled as BASE_LR
_C.TRAIN.CLIP_GRAD = 5.0  # global L2 norm; 0 or None: no clipping
# Go on from the newest checkpoint in OUTPUT, also where MODEL.RESUME names an older one.
_C.TRAIN.AUTO_RESUME = True
_C.TRAIN.ACCUMULATION_STEPS = 0  # micro-batches per update; 0 and 1 mean none
# (new) Updates in a row that may be skipped for non-finite gradients before the run stops with an
# error; 0: no limit. More than 16, the halvings from the first loss scale to its minimum.
_C.TRAIN.MAX_CONSECUTIVE_OVERFLOWS = 25
# (new) The training program saves ckpt_epoch_overflow before that error.
_C.TRAIN.SAVE_ON_OVERFLOW = False
_C.TRAIN.USE_CHECKPOINT = False  # activation checkpointing
# (new) For training at ZeRO stage 3: whether the model is built in slices, with at most 1/N of the
# weights and the largest of them on each of N ranks: 'auto' from 2 GiB (float32) on, 'always',
# 'never'. The numbers are the same.
_C.TRAIN.SHARDED_BUILD = 'auto'
# (new) Save inside an epoch, as ckpt_epoch_E_step_S: every so many updates, and at the first update
# that ends so many minutes after the last save; 0: not.
_C.TRAIN.SAVE_STEPS = 0
_C.TRAIN.SAVE_MINUTES = 0.0  # minutes, see SAVE_STEPS
# (new) Save inside an epoch so often that saves take this share of the time, by what they are
# measured to cost; in the place of SAVE_STEPS and SAVE_MINUTES. 0: not.
_C.TRAIN.SAVE_OVERHEAD = 0.0
# (new) Exit status of a run that SIGTERM, SIGUSR1, SIGHUP or Ctrl-C (SIGINT) had save and stop; a
# second Ctrl-C, or one where nothing is trained yet, ends it at once with 130.
_C.TRAIN.PREEMPT_EXIT_CODE = 0
# (new) Print the traceback also of errors that this package raises on purpose (one line otherwise).
_C.TRAIN.TRACEBACK = False
# (new) The backend of torch.compile for the forward and backward pass: 'inductor', or another that
# torch knows; '': none.
_C.TRAIN.COMPILE = ''
# (new) Take algorithms that give the same bits each time, also in the backward passes of attention
# and convolutions on a GPU, which are slower; an operation that has none is an error that names it.
_C.TRAIN.DETERMINISTIC = False

# (new) '': soft-target cross entropy with mixup, else label smoothing or plain, as the original.
# 'bce': timm's BinaryCrossEntropy, also with mixup, and for targets of several classes an image.
_C.TRAIN.LOSS = ''
# (new) Of bce: targets above it are 1 and others 0; None: as they are.
_C.TRAIN.BCE_TARGET_THRESH = None
_C.TRAIN.BCE_SUM = False  # (new) of bce: sum over classes, not mean; then the mean over images
# (new) Make the running statistics of batch norms the same on all ranks at the end of an epoch,
# before evaluation and saving: 'reduce' (their mean), 'broadcast' (rank 0's). '': each rank
# evaluates with its own, and rank 0's are saved.
_C.TRAIN.DIST_BN = ''

_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = 'cosine'  # cosine, linear, step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # of step: epochs between two decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # of step: factor of each decay

_C.TRAIN.OPTIMIZER = CN()
# 'adamw', 'sgd' (Nesterov), sgd_linear_probing (momentum 0.9), or one of timm's.
_C.TRAIN.OPTIMIZER.NAME = 'adamw'
# (new) Which AdamW 'adamw' is. 'auto': DeepSpeedCPUAdam where the ds_config offloads the optimizer,
# FusedAdam on a GPU at ZeRO stages 1 to 3, else torch's; where DeepSpeed's cannot be compiled, a
# warning, and torch's. 'torch', 'cpu' and 'fused' force one.
_C.TRAIN.OPTIMIZER.ADAM = 'auto'
_C.TRAIN.OPTIMIZER.EPS = 1e-8  # of adamw, and of timm's that have one
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)  # of adamw, and of timm's that have as many
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # of sgd, and of timm's that have one
_C.TRAIN.OPTIMIZER.USE_ZERO = False  # ZeRO stage 1, where the ds_config does not state a stage
_C.TRAIN.OPTIMIZER.FREEZE_BACKBONE = None  # True trains the head only; a list freezes levels.{i}
# Factor of the lr of deformable convolutions' own parameters; None: none.
_C.TRAIN.OPTIMIZER.DCN_LR_MUL = None

_C.TRAIN.EMA = CN()
_C.TRAIN.EMA.ENABLE = False  # keep an average of the weights, evaluate and save it
_C.TRAIN.EMA.DECAY = 0.9998  # of the average, an update
_C.TRAIN.EMA.WARMUP = False  # (new) let the decay rise from 0, as timm's ModelEmaV3 does

_C.TRAIN.DISTILL = CN()
# (new) A model of timm, whose answers training follows beside the labels; '': none. It is frozen,
# whole on each rank, in the engine's precision, and in no checkpoint: a resumed run loads it again.
_C.TRAIN.DISTILL.TEACHER = ''
_C.TRAIN.DISTILL.PRETRAINED = ''  # (new) its weights, as MODEL.PRETRAINED; of as many classes
# (new) 'soft': Kullback-Leibler divergence from its probabilities, times TEMPERATURE squared;
# 'hard': cross entropy with its most likely class.
_C.TRAIN.DISTILL.TYPE = 'soft'
_C.TRAIN.DISTILL.ALPHA = 0.5  # (new) the teacher's share of the loss, from 0 to 1
_C.TRAIN.DISTILL.TEMPERATURE = 1.0  # (new) of soft: what all logits are divided by

_C.TRAIN.LR_LAYER_DECAY = False  # scale the lr down by depth
_C.TRAIN.LR_LAYER_DECAY_RATIO = 0.875  # factor of each layer
# Drop a pretrained head of another length, and scale the model's own by 0.001.
_C.TRAIN.RAND_INIT_FT_HEAD = False

_C.AUG = CN()
# Strength, where AUTO_AUGMENT is none; 0: none. This key, AUTO_AUGMENT and REPROB are of TRANSFORM
# build_transform alone.
_C.AUG.COLOR_JITTER = 0.4
_C.AUG.AUTO_AUGMENT = 'rand-m9-mstd0.5-inc1'  # timm's policy, '3a' among them; none: none
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = 'pixel'  # what erased areas hold: const, rand, pixel
_C.AUG.RECOUNT = 1  # areas erased in an image, at most
_C.AUG.MIXUP = 0.8  # alpha of mixup; 0: none
_C.AUG.CUTMIX = 1.0  # alpha of cutmix; 0: none
# Two shares between which a cut is, in place of alpha; it turns cutmix on.
_C.AUG.CUTMIX_MINMAX = None
_C.AUG.MIXUP_PROB = 1.0  # probability that a batch (pair, image) is mixed
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix where both are on
_C.AUG.MIXUP_MODE = 'batch'  # what is mixed alike: batch, pair, elem
# Evaluate on random crops where TEST.CROP is False; refused then, since no number could be
# reproduced.
_C.AUG.RANDOM_RESIZED_CROP = False
_C.AUG.HFLIP = 0.5  # (new) probability of a horizontal flip; 0 for characters and digits
_C.AUG.SCALE = (0.08, 1.0)  # (new) range of the random crop, as a share of the image's area
_C.AUG.MEAN = (0.485, 0.456, 0.406)  # subtracted from each colour of an image of 0 ... 1
_C.AUG.STD = (0.229, 0.224, 0.225)  # what each colour is divided by then

_C.TEST = CN()
# Resize the shorter side and crop the centre; False: squeeze the whole image.
# build_transform_for_linear_probe crops always.
_C.TEST.CROP = True
# Have each rank evaluate all images, in the batches of one process, whose numbers they then are bit
# for bit; False: each evaluates its share. Either way each image counts once.
_C.TEST.SEQUENTIAL = False

_C.CHECKPOINT = CN()  # (new)
# Seconds within which every rank must come to a save or a load before the missing are named.
_C.CHECKPOINT.RENDEZVOUS_TIMEOUT = 300
# Seconds that one rank may need longer than another to write, flush or read its files.
_C.CHECKPOINT.IO_TIMEOUT = 1800
# Save in the background: training goes on at once, and waits before its next update for what is
# not copied yet in memory.
_C.CHECKPOINT.ASYNC = False
# When the copy is made. 'overlap': beside the next forward and backward passes, for a script that
# writes to weights and optimizer state by updates and this package alone. 'at once': before the
# call returns. 'auto': 'overlap' in the training program without a MODEL.FACTORY, else 'at once'.
_C.CHECKPOINT.ASYNC_COPY = 'auto'
# GiB of memory for each rank's copy; the next update waits for the rest to be written (0: all).
_C.CHECKPOINT.ASYNC_MEMORY = 0.0
# MB a second that a rank writes of a background save, until somebody waits for it (0: no limit).
_C.CHECKPOINT.ASYNC_RATE = 0.0
# How many epoch tags stay for their accuracy, beside the newest SAVE_CKPT_NUM (0: none).
_C.CHECKPOINT.KEEP_BEST = 0
# Every epoch that this divides stays for good (0: none).
_C.CHECKPOINT.KEEP_EVERY = 0
# How many tags saved inside an epoch stay; the one saved last always does.
_C.CHECKPOINT.KEEP_STEPS = 1

# What a tag does with the parameters that the optimizer does not train.
# 'keep': each tag holds them. The default, because such a tag is whole by itself, and plain
#     DeepSpeed's load_checkpoint takes it as it is; a tag is as large as the model then.
# 'once': they stand in a file that all tags of OUTPUT with the same values share, by hard links:
#     one on disk, whole in each tag and in a copy of one (where the file system has no links, next
#     to the tags). Plain DeepSpeed loads the rest, with load_module_strict=False.
# 'auto': as 'once' where they are most of the parameters and 64 MiB or more, as in a linear probe,
#     and OUTPUT has hard links; else as 'keep'.
# 'omit': no tag holds them. A tag says which file load_pretrained took them from, and their digest;
#     a load takes them from there, or from where MODEL.PRETRAINED is now, and refuses another file.
_C.CHECKPOINT.FROZEN = 'keep'

# Let several jobs write into one OUTPUT, where tags, metrics and retention of all are then one.
_C.CHECKPOINT.SHARED_OUTPUT = False
# Seconds that a job waits for another one that still writes into its OUTPUT, before it is an error.
_C.CHECKPOINT.LOCK_WAIT = 0.0
# Seconds without a sign of life after which a job of another host, whose file locks cannot be seen,
# no longer holds OUTPUT.
_C.CHECKPOINT.LOCK_AGE = 60.0
# Seconds without a write after which a save of such a job was left by a dead one, and is removed.
_C.CHECKPOINT.LEFTOVER_AGE = 86400.0

# A second place for the tags, beside OUTPUT: s3://BUCKET/DIR, gs://BUCKET/DIR or file:///DIR; ''
# for none. Each tag is uploaded after its commit, while training goes on; auto resume takes the
# newest whole tag of both places. The training program appends what it appends to OUTPUT: the
# YAML's stem, and the tag of the experiment.
_C.CHECKPOINT.MIRROR = ''
# Seconds that the end of a run, and a stop by a signal, waits for uploads that are under way.
_C.CHECKPOINT.MIRROR_WAIT = 300.0

_C.BENCH = CN()  # (new)
# Train so many updates, write how fast they were to OUTPUT/bench.json, and end without evaluating
# or saving anything; 0: train as usual. EVAL_MODE and THROUGHPUT_MODE come first.
_C.BENCH.UPDATES = 0
_C.BENCH.WARMUP = 3  # updates before them, which are not timed

_C.COMM = CN()  # (new)
# Seconds within which a collective must end, in every process group, and a batch be read.
_C.COMM.TIMEOUT = 1800
_C.COMM.INIT_TIMEOUT = 300  # seconds within which all ranks must have joined
_C.COMM.EXIT_TIMEOUT = 60  # seconds that an ending rank waits for what others still need of it
# Seconds after which a host that does not answer is taken for dead; a rank that ends is at once.
# As long a collective is waited in for a dead rank, where it does not end by itself.
_C.COMM.DEAD_AFTER = 10
# Seconds without an answer after which a rank is called silent, which ends no wait.
_C.COMM.SILENT_AFTER = 4
# Seconds after which a save warns that ranks have not come, which ends no wait; 0: it does not.
_C.COMM.WARN_AFTER = 5
_C.COMM.CONNECT_TIMEOUT = 3  # seconds for one try to reach an address
_C.COMM.ABORT_TIMEOUT = 5  # seconds that aborting an MPI job may take
_C.COMM.INTERFACE = ''  # the network interface of rank 0's address; '' finds one that works

# '' is the original flag's default, O1, and lets a ds_config that sets a precision decide.
_C.AMP_OPT_LEVEL = ''
_C.AMP_TYPE = 'float16'  # or 'bfloat16'
_C.OUTPUT = ''  # folder of checkpoints and logs; --output DIR makes it DIR/<YAML stem>[/<tag>]
_C.TAG = 'default'  # subfolder of OUTPUT, unless 'default'
_C.SAVE_FREQ = 1  # epochs; 0: after the last one only
_C.SAVE_CKPT_NUM = 1  # epoch tags kept; below 1: all
_C.PRINT_FREQ = 10  # micro-batches; 0: after the last one of an epoch only
_C.EVAL_FREQ = 1  # epochs; 0: after the last one only
# (new) Evaluate what MODEL.RESUME or PRETRAINED loaded once before training, as the original does.
_C.EVAL_LOADED = True
_C.SEED = 0  # of weights, order, augmentation, mixup and dropout
_C.EVAL_MODE = False  # evaluate only
_C.THROUGHPUT_MODE = False  # time forward passes only
# Set by --local-rank and not read: the launcher's environment says which device a rank has.
_C.LOCAL_RANK = 0
_C.EVAL_22K_TO_1K = False  # measure a head of 21841 classes on the 1000 of ImageNet-1K
