/* edge-razor: the native training runtime. C ABI, version 1.
 *
 * This header is all that a program needs to know. A program fine-tunes a network that was exported and planned ahead:
 *
 *   edge-razor export mypackage.models:flowers -o flowers.razor --input 3x224x224           (workstation, with PyTorch)
 *   edge-razor plan flowers.razor --mem-budget 128MB --batch-size 8 -o flowers.plan         (workstation or device)
 *
 * and ships with flowers.plan (the steps of training, with the place of every byte) and
 * flowers.razor/weights.safetensors (the pretrained weights). It needs libedge_razor, no Python. A complete
 * program; checks of malloc and fread are left out (examples/embed_c is a longer one with data, evaluation and a clean
 * stop):
 *
 *   #include <errno.h>
 *   #include <stdio.h>
 *   #include <stdlib.h>
 *   #include "edge_razor.h"
 *
 *   static void check(er_status status) {
 *     if (status == ER_OK) return;
 *     fprintf(stderr, "%s\n", er_last_error());
 *     exit(1);
 *   }
 *
 *   int main(void) {
 *     FILE* file = fopen("flowers.plan", "rb");
 *     if (!file) return 1;
 *     static char plan[16 << 20];
 *     size_t plan_bytes = fread(plan, 1, sizeof plan, file);
 *     fclose(file);
 *
 *     er_session* session;
 *     check(er_session_create(plan, plan_bytes, &session));
 *     check(er_weights_load(session, "flowers.razor/weights.safetensors"));
 *     uint64_t update = 0;                                       // updates done
 *     file = fopen("flowers.checkpoint", "rb");
 *     if (file) fclose(file);
 *     if (file || errno != ENOENT)                               // one that cannot be read must not be replaced
 *       check(er_checkpoint_load(session, "flowers.checkpoint", &update, NULL, 0, NULL));
 *
 *     er_info info;
 *     er_tensor_info image, scores;
 *     check(er_session_info(session, &info));
 *     check(er_input_info(session, 0, &image));                  // shape[0] is the micro-batch
 *     check(er_output_info(session, 0, &scores));
 *     uint64_t pixels = image.elements / info.micro_batch, classes = scores.elements / info.micro_batch;
 *     uint32_t n = info.batch_size;
 *     float* x = calloc(n * pixels, sizeof *x);                  // NCHW, normalized as in training
 *     int32_t* y = calloc(n, sizeof *y);                         // class indices
 *     float* out = calloc(n * classes, sizeof *out);
 *     er_array batch[] = {{x, n * pixels * sizeof *x, 0, 0}, {y, n * sizeof *y, 1, 0}};
 *
 *     for (int i = 0; i < 100; i++) {                            // fill x and y with the next batch here
 *       float loss;
 *       check(er_train_step(session, batch, n, 1e-3f, update + 1, 0, &loss));
 *       update++;
 *       if (update % 20 == 0) check(er_checkpoint_save(session, "flowers.checkpoint", update, NULL, 0));
 *     }
 *     er_evaluation figures;
 *     check(er_evaluate(session, batch, n, &figures));
 *     printf("loss %g, accuracy %g\n", figures.loss, figures.accuracy);
 *     check(er_predict(session, batch, n, &out));                // the target is not looked at
 *     check(er_weights_save(session, "flowers.tuned.safetensors"));
 *     er_session_free(session);
 *     return 0;
 *   }
 *
 * Conventions
 *
 * - Units: sizes are bytes unless a name says otherwise; `elements` counts numbers. Arrays are little-endian,
 *   contiguous, row-major, aligned to their elements. "The user's layout" is PyTorch's: NCHW images, OIHW and [out, in]
 *   weights.
 *
 * - Ownership: the caller owns everything that it passes in; nothing is kept after a call, paths and the plan included,
 *   but a weights file stays open and mapped if the plan reads frozen parameters there.
 *   Names in er_tensor_info and er_profile_entry belong to the session and live as long as it does.
 *
 * - Memory: er_session_create maps `arena_bytes`, `params_bytes` and `state_bytes` of er_info, zeroed, which become
 *   resident as they are touched, and builds the plan's tables. Nothing is allocated after that and er_spill_open,
 *   except for the time of a call the header of a weights or checkpoint file, and memory for a frozen parameter of the
 *   weights file that is written, or lies there unaligned.
 *
 * - Errors: every call returns a status; er_last_error() says in one line what is wrong, of which tensor or file. No
 *   call throws, aborts or prints. A plan, a weights file or a checkpoint from anywhere may be passed: what is damaged,
 *   altered or of another version is refused, and never read or written out of bounds.
 *
 * - Threads: any call may be made from any thread. Calls on one session (or on sessions that share memory) that touch
 *   its memory run one at a time, in order of arrival: a prediction that is asked for while another thread trains waits
 *   for the running step, then sees whole updates only. Different sessions run at the same time. er_session_free must
 *   be the last call on its session: nothing may be running or waiting on it. A signal handler must not call the
 *   library: let it set a flag, and stop between steps. A child process must not use its parent's sessions.
 *
 * - Environment: EDGE_RAZOR_ISA, see er_isa. */
#ifndef EDGE_RAZOR_H
#define EDGE_RAZOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define ER_API __declspec(dllexport)
#else
#define ER_API __attribute__((visibility("default")))
#endif

#define ER_ABI_VERSION 1
#define ER_MAX_RANK 8

typedef enum er_status {
  ER_OK = 0,
  ER_INVALID_ARGUMENT = 1, /* a wrong pointer, name, size or value in the call */
  ER_BAD_PLAN = 2,         /* the plan is truncated, altered, of another version, or inconsistent */
  ER_BAD_FILE = 3,         /* a weights or checkpoint file is not what it claims to be, or of another model */
  ER_OUT_OF_MEMORY = 4,    /* the arena, parameters or state cannot be allocated */
  ER_NON_FINITE =
      5,    /* the loss or a packed activation is NaN or infinite; no parameter was changed by this micro-batch */
  ER_IO = 6 /* the operating system refused to open, read or write a file; message has its reason. From er_train_step:
               while writing the spill file, no parameter was changed by this micro-batch; while reading it, the step is
               half done, and every later er_train_step of the session fails */
} er_status;

typedef struct er_session er_session;

/* Message of this thread's last failing call; never NULL; valid until the thread's next call. */
ER_API const char* er_last_error(void);
/* ER_ABI_VERSION of the library. Functions are added without a new version; what is there keeps its meaning. */
ER_API uint32_t er_abi_version(void);
/* Instruction set that the kernels were chosen for: "avx512vbmi2", "avx512", "avx2" or "portable" (the compiler's
 * baseline: SSE2, NEON). The environment variable EDGE_RAZOR_ISA names a lower one; with a name that this machine or
 * build does not have, every call fails. */
ER_API const char* er_isa(void);

/* ---- Session: a plan that is being executed ---- */

typedef struct er_info {
  uint64_t arena_bytes, params_bytes, state_bytes;
  uint32_t batch_size, micro_batch, threads;
  uint32_t params, inputs, outputs; /* counts; inputs include the target, which comes last */
  uint32_t train_steps, eval_steps;
} er_info;

typedef struct er_tensor_info {
  const char* name; /* owned by the session */
  uint32_t dtype;   /* 0 float32, 1 int32 */
  uint32_t rank;
  uint64_t shape[ER_MAX_RANK]; /* the user's layout (torch); inputs and outputs: first = micro_batch */
  uint64_t elements;
  uint32_t trainable; /* parameters */
  uint32_t states;    /* parameters: optimizer state tensors of the same shape */
} er_tensor_info;

/* Checks the plan, allocates arena, parameters and state (zeroed), starts the threads. On failure *session is NULL. */
ER_API er_status er_session_create(const void* plan, size_t plan_bytes, er_session** session);
/* The same for another plan of the same model, for samples of another size (`edge-razor plan -o` writes one for each
 * bucket of text lengths): both work on the memory, the parameters and the threads of `base`, whose arena must be as
 * large. They count as one session, and may be freed in any order. */
ER_API er_status er_session_create_shared(const void* plan, size_t plan_bytes, const er_session* base,
                                          er_session** session);
ER_API void er_session_free(er_session* session); /* NULL is fine */
ER_API er_status er_session_info(const er_session* session, er_info* info);
ER_API er_status er_param_info(const er_session* session, uint32_t index, er_tensor_info* info);
ER_API er_status er_input_info(const er_session* session, uint32_t index, er_tensor_info* info);
ER_API er_status er_output_info(const er_session* session, uint32_t index, er_tensor_info* info);

typedef struct er_resident {
  uint64_t arena, params, state;
} er_resident;
/* How many bytes of the session's memory are resident now: those that were touched and are not swapped out. Pages of a
 * weights file that is read in place are not among them. */
ER_API er_status er_session_resident(const er_session* session, er_resident* resident);

/* ---- Parameters and optimizer state ---- */

/* Copies a parameter in or out, torch layout; elements must match. Writing one that the plan has in the weights file
 * gives it memory of its own, which the plan does not count; one that the plan stores in bf16 or int8 is rounded to
 * that. */
ER_API er_status er_param_write(er_session* session, uint32_t index, const float* data, uint64_t elements);
ER_API er_status er_param_read(const er_session* session, uint32_t index, float* data, uint64_t elements);
/* Copies optimizer state tensor `slot` of a parameter in or out, torch layout. */
ER_API er_status er_state_write(er_session* session, uint32_t index, uint32_t slot, const float* data,
                                uint64_t elements);
ER_API er_status er_state_read(const er_session* session, uint32_t index, uint32_t slot, float* data,
                               uint64_t elements);
/* Copies elements first … first + elements − 1 (torch order) of a parameter, or of its optimizer state tensor `slot`;
 * slot = ER_PARAMETER means the parameter itself. So a file is written and read through a buffer of any size. A frozen
 * parameter that is not float32 in memory can be read so, but is only written whole (er_param_write). */
#define ER_PARAMETER 0xffffffffu
ER_API er_status er_range_write(er_session* session, uint32_t index, uint32_t slot, uint64_t first, const float* data,
                                uint64_t elements);
ER_API er_status er_range_read(const er_session* session, uint32_t index, uint32_t slot, uint64_t first, float* data,
                               uint64_t elements);
/* Reads all parameters from, or writes them to, a safetensors file. Loading needs every parameter, float32, of the
 * right shape; other tensors are ignored; nothing is changed unless all are there. Parameters that the plan has in the
 * weights file are mapped read-only and read there from then on: the file must stay as it is (replacing it by a rename
 * is fine). A step or prediction after its size or modification time has changed fails with ER_BAD_FILE; cutting it
 * short while a step runs kills the process (SIGBUS). Saving is durable, like er_checkpoint_save, and may replace the
 * file that was loaded. */
ER_API er_status er_weights_load(er_session* session, const char* path);
/* The same for a safetensors file that lies in another: `bytes` bytes from `offset` on, such as a stored zip member. If
 * its tensors are not aligned to 4 bytes there, they are copied to memory instead of being read in place. */
ER_API er_status er_weights_load_at(er_session* session, const char* path, uint64_t offset, uint64_t bytes);
ER_API er_status er_weights_save(const er_session* session, const char* path);

/* ---- Training, evaluation, prediction ---- */

/* One batch in the caller's memory. */
typedef struct er_array {
  const void* data;
  uint64_t bytes;
  uint32_t dtype;  /* 0 float32, 1 int32, 2 uint8 (normalized with the plan's mul and add) */
  uint32_t layout; /* 0 the user's (NCHW), 1 the runtime's (NHWC) */
} er_array;

/* One optimizer update from `samples` (1 … batch_size) samples; `arrays` = one per input, target last. `update` counts
 * from 1 and, with `seed`, fixes dropout and AdamW's bias correction. *loss is the mean over the samples, before the
 * update. The same plan, weights, batches, rates, updates and seed give the same bits on the same instruction set. */
ER_API er_status er_train_step(er_session* session, const er_array* arrays, uint32_t samples, float learning_rate,
                               uint64_t update, uint64_t seed, float* loss);
/* Forward pass in inference mode over any number of samples; `outputs` holds, for each plan output, a buffer of
 * samples × elements-a-sample float32 in the user's layout. `inputs`: one per input, without the target (or with it).
 */
ER_API er_status er_predict(er_session* session, const er_array* inputs, uint64_t samples, float* const* outputs);

typedef struct er_evaluation {
  double loss;     /* the training loss, mean over `weight`, in inference mode */
  double accuracy; /* share of `weight` that is right, 0 … 1: the largest output is the target's (cross-entropy), or the
                      outputs have the targets' signs (binary); NaN for a loss that knows no right answer */
  uint64_t weight; /* targets that count (cross-entropy), or samples: for means over several calls */
} er_evaluation;

/* Loss and accuracy over any number of samples; arrays as for er_train_step. Nothing is trained. */
ER_API er_status er_evaluate(er_session* session, const er_array* arrays, uint64_t samples, er_evaluation* result);

/* ---- Checkpoints ---- */

/* Writes what training has changed to one file: the trainable parameters, the optimizer state, `update` (updates done),
 * and up to 65536 bytes of the program's own, `user` (its place in the data, its random state; NULL with 0). The file
 * takes the place of `path` whole and durably: it is written to <path>.tmp, flushed to the disk, renamed, and the
 * directory is flushed; until then, and whenever anything fails, the checkpoint that was there stays. Every tensor has
 * a checksum. Streams: no copy of the parameters is made. ER_NON_FINITE: a value is NaN or infinite; nothing was
 * replaced. ER_IO: disk full, no permission, or another writer of the same path. */
ER_API er_status er_checkpoint_save(const er_session* session, const char* path, uint64_t update, const void* user,
                                    size_t user_bytes);
/* Takes it back, into a session of the same model, trainable parameters and optimizer whose weights were loaded
 * (er_weights_load: what is frozen is not in the checkpoint): training goes on to the same bits as if it had never
 * stopped. *user_bytes (may be NULL) is how many bytes of `user` were filled; more than `capacity` is
 * ER_INVALID_ARGUMENT. Everything, checksums included, is checked before anything changes. ER_IO: there is no such
 * file, or it cannot be read now: look whether it is there before you start over. ER_BAD_FILE: it is damaged, or of
 * another model or optimizer. */
ER_API er_status er_checkpoint_load(er_session* session, const char* path, uint64_t* update, void* user,
                                    size_t capacity, size_t* user_bytes);

/* ---- Kept tensors in a file ---- */

/* For a plan that keeps tensors in a file between the forward and the backward pass: makes that file in `directory`,
 * with room for all of them, and a thread that writes and reads it. Call it before the first er_train_step, which
 * otherwise fails. The file has no name, so nothing is left behind. Sessions that share memory share the file, too, but
 * each must call this. Does nothing for a plan that spills nothing. */
ER_API er_status er_spill_open(er_session* session, const char* directory);

typedef struct er_spill_info {
  uint64_t file_bytes;                /* that the plan needs in the file; 0: it spills nothing */
  uint64_t written_bytes, read_bytes; /* since the file was made, also by sessions that share it */
  double waited_seconds;              /* that steps stood still for the file */
} er_spill_info;
ER_API er_status er_spill_read_info(const er_session* session, er_spill_info* info);

/* ---- Where the time goes ---- */

typedef struct er_profile_entry {
  const char *kernel, *label; /* owned by the session */
  uint32_t phase;             /* 0 train, 1 eval */
  uint64_t calls;
  double seconds;
} er_profile_entry;
/* Starts (enabled = 1, counts from zero) or stops timing of every step. */
ER_API er_status er_profile(er_session* session, int enabled);
/* Entry `index` in plan order, train steps first. */
ER_API er_status er_profile_read(const er_session* session, uint32_t index, er_profile_entry* entry);

/* ---- For planners, tests and tools ---- */

/* Size of a kept tensor. form: 0 dense float32, 1 bf16, 2 razor plain, 3 razor centered; keep: values a sample. Form 4
 * is a matrix [rows, cols] a sample of which each row keeps `keep` values. 0 if the arguments are invalid. */
ER_API uint64_t er_packed_bytes(uint32_t form, uint64_t samples, uint64_t rows, uint64_t cols, uint64_t keep);
/* Writes the dense tensor that a kept tensor stands for. */
ER_API er_status er_unpack(uint32_t form, uint64_t samples, uint64_t rows, uint64_t cols, uint64_t keep,
                           const void* packed, uint64_t packed_bytes, float* dense);
/* Scratch bytes that suffice for a kernel call with every instruction set that this machine has: a plan does not depend
 * on which is used. (NEON needs no more than AVX2.) */
ER_API er_status er_kernel_scratch(const char* kernel, const int64_t* ints, uint32_t n_ints, const float* floats,
                                   uint32_t n_floats, uint32_t threads, uint64_t* bytes);

typedef struct er_operand {
  void* data; /* NULL: absent */
  uint64_t bytes;
} er_operand;
typedef struct er_context { /* docs/plan-format.md, "Step context" */
  float learning_rate;
  uint64_t update, seed;
  uint32_t micro_index, micro_count;
  uint64_t valid_batch, valid_micro, first_sample;
  double loss;            /* losses add to it */
  uint64_t counted_batch; /* targets of the whole batch that cross_entropy does not ignore; 0: all */
} er_context;
/* Checks and runs one kernel on the caller's buffers, each aligned to 8 bytes. Scratch, if the kernel needs some, is
 * the last operand. */
ER_API er_status er_kernel_run(const char* kernel, const int64_t* ints, uint32_t n_ints, const float* floats,
                               uint32_t n_floats, const er_operand* operands, uint32_t n_operands, uint32_t threads,
                               er_context* context);

#ifdef __cplusplus
}
#endif
#endif
