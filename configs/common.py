"""Every key of a vocojax config, with its unit or what follows from it.

The other files of this folder change some of these. On the command line:
`--config=configs/easyvqa_1tok.py --config.training.steps=100`.
The defaults are the shapes of VoCo-LLaMA 7B with one VoCo token.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # of initial weights, data order and question sampling
  # Checkpoint to start from ('' for none): a phase folder of a workdir. Only
  # parameters it lacks are initialised. In a later phase '' means the phase
  # before.
  c.init_from = ""
  # Names of phases, run in this order, each starting from the weights of the
  # one before. config.phase.NAME holds the keys that differ in phase NAME.
  # () is a single phase.
  c.phases = ()
  c.phase = ConfigDict()

  c.model = ConfigDict()
  c.model.attention = "two_stream"  # or 'bias': one joint masked pass, slow
  # 'splash' (TPU), 'cudnn' (GPU) or 'xla'; 'auto' is what suits the platform.
  c.model.attention_kernel = "auto"
  c.model.attention_block_size = 640  # of splash: most tokens of a block
  c.model.logits_chunk = 8192  # rows of the vocabulary scored at a time
  # Parts of the MLP's width computed one after the other: less memory. Divides
  # it; no effect where config.mesh.tensor splits the width.
  c.model.mlp_chunks = 1
  c.model.dtype = "bfloat16"  # of activations and matrix products
  c.model.param_dtype = "float32"  # of weights and optimiser state
  c.model.remat = "full"  # recompute layers: 'none', 'dots' (keep products)
  c.model.scan_layers = True  # False unrolls: longer compile, faster on CPU
  c.model.projector = "mlp2x_gelu"  # or 'linear'; vision width to LLM width

  llm = c.model.llm = ConfigDict()
  llm.vocab_size = 32001  # tokens of the tokenizer, <voco> included
  llm.vocab_multiple = 128  # rows are padded to this; never sampled
  llm.hidden_size = 4096  # width of the residual stream
  llm.intermediate_size = 11008  # width inside the SwiGLU
  llm.num_hidden_layers = 32  # each has keys and values of every VoCo token
  llm.num_attention_heads = 32  # query heads
  llm.num_key_value_heads = 32  # fewer than the above: grouped heads
  llm.head_dim = 128  # even; times the heads it need not be hidden_size
  llm.rms_norm_eps = 1e-5  # added to the mean square
  llm.tie_word_embeddings = False  # True: output head = input embedding
  llm.initializer_range = 0.02  # standard deviation of new weights
  llm.rope = ConfigDict()
  llm.rope.theta = 10000.0  # base of the wavelengths; larger reaches further
  llm.rope.scaling = "none"  # 'llama3': the keys below take effect
  llm.rope.factor = 8.0  # longest wavelengths are stretched by it
  llm.rope.low_freq_factor = 1.0  # above context / this: stretched in full
  llm.rope.high_freq_factor = 4.0  # below context / this: left alone
  llm.rope.original_max_position_embeddings = 8192  # that context, tokens
  # 'bfloat16': positions are rounded to 8 bits in training only, as happens in
  # the original under ZeRO-3. From 512 on, four neighbours share an angle.
  llm.rope.round_positions = "none"

  vision = c.model.vision = ConfigDict()
  vision.image_size = 336  # pixels a side
  vision.patch_size = 14  # pixels a side; (336/14)^2 = 576 patches
  vision.hidden_size = 1024  # width of a patch
  vision.intermediate_size = 4096  # width inside the MLP
  vision.num_hidden_layers = 24  # of the published tower, also if fewer run
  vision.num_attention_heads = 16  # divides hidden_size
  vision.layer_norm_eps = 1e-5  # added to the variance
  vision.hidden_act = "quick_gelu"  # or 'gelu'
  vision.feature_layer = -2  # hidden_states index; -1 is the last layer
  vision.initializer_range = 0.02  # standard deviation of new weights

  c.model.compressor = ConfigDict()
  # 'voco_causal': text sees all, VoCo tokens too (the upper bound); 'full': all
  # patches, no VoCo tokens (LLaVA); 'avgpool': k means; 'qformer': k learned
  # queries; 'blind': nothing of the image.
  c.model.compressor.name = "voco"
  c.model.compressor.num_voco_tokens = 1  # k, 1 to 128
  # 'elastic' (voco only): text sees the first 1, 2, 4, ... or k of them, drawn
  # for each record, so that one checkpoint answers from any such number.
  c.model.compressor.train_num_voco_tokens = "fixed"
  c.model.compressor.text_sees_bos = False  # True: text also sees BOS
  c.model.compressor.qformer_layers = 2  # blocks of 'qformer'

  c.prompt = ConfigDict()
  # 'voco_v1' is that of VoCo-LLaMA, 'vicuna_v1' that of LLaVA-1.5, 'plain' an
  # image and its caption, 'qa_v1' a bare question and answer.
  c.prompt.layout = "voco_v1"
  # 'original' deletes every newline of a conversation with images, as the
  # released training code did.
  c.prompt.strip_newlines = "none"

  c.data = ConfigDict()
  c.data.source = "llava_json"  # or 'easy_vqa', 'grid_vqa'
  c.data.grid_size = 2  # grid_vqa: cells a side, 2 to 4
  c.data.path = ""  # the JSON file; of the others the TFDS folder ('' default)
  c.data.image_folder = ""  # image paths in the JSON are relative to it
  c.data.tokenizer = ""  # folder of a Hugging Face tokenizer
  c.data.train_split = "train"  # TFDS split name
  c.data.max_text_length = 2048 - 580  # tokens of a text row
  c.data.max_images = 1  # image slots of a text row
  c.data.conversations_per_record = 0  # sampled from those of a record; 0 all
  # Training leaves out conversations that end in one of these answers, such as
  # ('yes', 'no') to begin with open questions.
  c.data.skip_answers = ()
  # 'shuffle' gives each record a row of its own. So does 'slots', but its
  # conversations_per_record have equal parts of the row, which saves attention
  # where they are many and about equally long. 'pack' puts as many as fit
  # into a row; metrics.jsonl says how full text rows and image slots are, and
  # both are if max_text_length / max_images is what a record has of each.
  # 'group_by_length' is LLaVA's order: records with and without images in
  # batches of their own; rows keep their length, so nothing is saved.
  c.data.batching = "shuffle"
  c.data.pack_lookahead = 256  # records that may wait for a fitting row
  c.data.batch_size = 128  # text rows per step, over all devices and hosts
  # Rows that the original has on a device at a time. 'group_by_length' gives
  # each such run of rows about equally many words; see training.loss_mean.
  c.data.micro_batch_size = 8
  c.data.flip_images = False  # mirror at random, both ways
  c.data.pad_to_square = True  # False: centre crop loses the long side's ends
  c.data.num_workers = 0  # processes that decode; 0 decodes in a thread
  c.data.prefetch_batches = 4  # ready ahead of the step, in host memory
  # 'truncate' cuts longer texts, as LLaVA does: max_text_length then counts the
  # positions of images and text together, so a text with an image is cut
  # earlier, and only text is. A record whose answers are all cut is left out.
  c.data.on_long_text = "refuse"
  c.data.on_bad_record = "stop"  # 'skip' counts and logs it, and goes on
  # When a run resumes on data other than it began with: 'accept' goes on, from
  # the beginning of the data if the number of records has changed.
  c.data.on_changed_data = "stop"

  c.optimizer = ConfigDict()
  # 'muon': matrices by muon, the rest by adamw. 'lion' keeps one moment of a
  # weight, 'adafactor' two vectors of a matrix, adamw two numbers of a weight.
  c.optimizer.name = "adamw"
  c.optimizer.learning_rate = 2e-5  # peak
  c.optimizer.adam_learning_rate = 0.0  # muon only: peak of its adamw part
  c.optimizer.b1 = 0.9  # Adam: memory of the gradient
  c.optimizer.b2 = 0.999  # Adam: memory of its square
  c.optimizer.eps = 1e-8  # Adam: smallest divisor
  # 'bfloat16' saves 2 bytes a weight. The second moment stays: its steps of
  # 1 - b2 would be lost in rounding.
  c.optimizer.first_moment_dtype = "float32"
  c.optimizer.weight_decay = 0.0  # times learning rate, per step
  # Parameters whose path matches one of these are not decayed.
  c.optimizer.no_decay = ("norm", "bias", "embed")
  c.optimizer.grad_clip = 1.0  # global norm; 0 is off
  c.optimizer.warmup_ratio = 0.03  # of all steps
  # 'linear', 'constant'; 'hf_cosine' is transformers': the first step is at
  # rate 0, and learns nothing.
  c.optimizer.schedule = "cosine"
  c.optimizer.end_learning_rate = 0.0  # as a fraction of the peak
  # Parameters whose path matches one of these are not trained: they get no
  # gradient and no optimiser state.
  c.optimizer.freeze = ("^vision/",)

  c.training = ConfigDict()
  c.training.steps = 0  # optimiser steps; this or epochs
  c.training.epochs = 0.0  # passes over the training split; packed: about
  c.training.accumulate = 1  # parts of a batch, in turn; divides batch_size
  # What a step's loss is the mean over: all trained tokens of its batch; or
  # 'micro_batches': the tokens of each run of data.micro_batch_size rows, and
  # then the runs. An answer among short ones then counts more than one among
  # long ones. Runs are of the order of rows, whatever the mesh and accumulate;
  # a packed row counts as one, however many records it holds.
  c.training.loss_mean = "tokens"
  c.training.log_every = 10  # steps
  c.training.checkpoint_every = 500  # steps
  c.training.keep_checkpoints = 2  # newest ones
  # Times KL(teacher || model) of the next token, added to the loss (voco only);
  # 0 is off. The teacher reads the same text, but sees all patches.
  c.training.distill_weight = 0.0
  # 'self': the weights as they are now, for one more pass over the text. Or a
  # phase folder with compressor 'full': its weights are held in memory too.
  c.training.teacher = "self"
  c.training.evaluate = False  # generate answers and score them at the end

  c.mesh = ConfigDict()  # devices along each axis; -1 is all the rest
  c.mesh.data = 1  # replicas; a multiple of the number of TPU slices
  c.mesh.fsdp = -1  # shards of weights, gradients and optimiser state
  c.mesh.tensor = 1  # shards within a layer

  c.evaluation = ConfigDict()
  c.evaluation.split = "test"  # TFDS split name
  c.evaluation.batch_size = 64  # records at once
  c.evaluation.max_new_tokens = 16  # answers are cut there
  c.evaluation.max_records = 0  # 0 is all
  # Also score the last 'voco_causal' phase (the upper bound) and its weights
  # read as 'voco' (the lower bound).
  c.evaluation.bounds = False
  # vocojax.evaluate --adaptive reads 1, 2, 4, ... VoCo tokens until no event
  # among an answer's first tokens changes its probability by more than this.
  c.evaluation.adaptive_threshold = 0.1
  return c
