/* Fine-tunes a small network on the device, with no Python: trains, saves, resumes, evaluates, predicts. The images are
 * generated, noisy seven-segment digits; a real app would read its own. See README.md. */
#include <edge_razor.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kSide = 20, kPixels = kSide * kSide, kClasses = 10, kHeldOut = 400, kCheckpointEvery = 50 };

/* Set by a signal; looked at between steps, so that what is saved is whole. */
static volatile sig_atomic_t stop = 0;
static void on_signal(int number) { stop = number; }

static void check(er_status status) {
  if (status == ER_OK) return;
  fprintf(stderr, "digits: %s\n", er_last_error());
  exit(1);
}

static void* allocate(size_t count, size_t size) {
  void* memory = calloc(count, size);
  if (memory) return memory;
  fprintf(stderr, "digits: out of memory\n");
  exit(1);
}

/* ---- Data: sample `index` is always the same image, on every machine ---- */

static uint32_t next_random(uint64_t* state) { /* splitmix64, the upper half */
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (uint32_t)((z ^ z >> 31) >> 32);
}

static int32_t draw_digit(uint64_t index, float* image) {
  /* Segments: top, upper left, upper right, middle, lower left, lower right, bottom; x, y, width, height. */
  static const int segments[7][4] = {{1, 0, 6, 2}, {0, 1, 2, 6}, {6, 1, 2, 6}, {1, 6, 6, 2},
                                     {0, 7, 2, 6}, {6, 7, 2, 6}, {1, 12, 6, 2}};
  static const char* const lit[kClasses] = {"1110111", "0010010", "1011101", "1011011", "0111010",
                                            "1101011", "1101111", "1010010", "1111111", "1111011"};
  uint64_t state = index * 2654435761u + 12345;
  const int32_t digit = (int32_t)(next_random(&state) % kClasses);
  const int left = 2 + (int)(next_random(&state) % 9), top = 1 + (int)(next_random(&state) % 5);
  for (int i = 0; i < kPixels; i++) image[i] = (float)(next_random(&state) % 1024) / 1024.0f * 0.6f - 0.3f;
  for (int s = 0; s < 7; s++) {
    if (lit[digit][s] == '0') continue;
    const int* box = segments[s];
    for (int y = box[1]; y < box[1] + box[3]; y++)
      for (int x = box[0]; x < box[0] + box[2]; x++) image[(top + y) * kSide + left + x] += 1.0f;
  }
  return digit;
}

typedef struct {
  float* images;   /* [samples, 1, kSide, kSide] */
  int32_t* labels; /* [samples] */
  er_array arrays[2];
} batch;

static batch new_batch(uint64_t samples) {
  batch b;
  b.images = allocate(samples * kPixels, sizeof(float));
  b.labels = allocate(samples, sizeof(int32_t));
  b.arrays[0] = (er_array){b.images, samples * kPixels * sizeof(float), 0, 0};
  b.arrays[1] = (er_array){b.labels, samples * sizeof(int32_t), 1, 0};
  return b;
}

static void fill(batch* b, uint64_t first, uint64_t samples) {
  for (uint64_t i = 0; i < samples; i++) b->labels[i] = draw_digit(first + i, b->images + i * kPixels);
}

static void free_batch(batch* b) {
  free(b->images);
  free(b->labels);
}

/* Samples that training never sees. */
static batch held_out(void) {
  batch b = new_batch(kHeldOut);
  fill(&b, UINT64_C(1) << 32, kHeldOut);
  return b;
}

/* ---- What the program does ---- */

static er_session* open_session(const char* plan_path, const char* weights_path) {
  FILE* file = fopen(plan_path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) {
    perror(plan_path);
    exit(1);
  }
  const long bytes = ftell(file);
  rewind(file);
  void* plan = allocate(bytes > 0 ? (size_t)bytes : 1, 1);
  const size_t got = fread(plan, 1, bytes > 0 ? (size_t)bytes : 0, file);
  fclose(file);
  er_session* session;
  check(er_session_create(plan, got, &session));
  free(plan); /* the session keeps nothing of it */
  check(er_weights_load(session, weights_path));

  er_info info; /* this program is written for one network */
  er_tensor_info image, scores;
  check(er_session_info(session, &info));
  if (info.inputs != 2 || info.outputs != 1) {
    fprintf(stderr, "digits: %s is a plan of another network\n", plan_path);
    exit(1);
  }
  check(er_input_info(session, 0, &image));
  check(er_output_info(session, 0, &scores));
  if (image.elements != (uint64_t)kPixels * info.micro_batch ||
      scores.elements != (uint64_t)kClasses * info.micro_batch) {
    fprintf(stderr, "digits: %s is a plan of another network\n", plan_path);
    exit(1);
  }
  return session;
}

/* Goes on from the checkpoint if there is one; returns the updates done. Only a file that is not there means to begin:
 * one that cannot be read now must not be replaced by what is trained anew. */
static uint64_t resume(er_session* session, const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file && errno == ENOENT) return 0;
  if (file) fclose(file);
  uint64_t update = 0;
  check(er_checkpoint_load(session, path, &update, NULL, 0, NULL));
  return update;
}

static void train(er_session* session, const char* checkpoint, uint64_t last) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
  er_info info;
  check(er_session_info(session, &info));
  batch b = new_batch(info.batch_size);
  uint64_t update = resume(session, checkpoint);
  const uint64_t begin = update;
  if (begin) printf("resumed after update %llu\n", (unsigned long long)begin);
  float loss = 0;
  while (update < last && !stop) {
    fill(&b, update * info.batch_size, info.batch_size); /* the place in the data follows from the update */
    check(er_train_step(session, b.arrays, info.batch_size, 0.02f, update + 1, 0, &loss));
    update++;
    if (update % kCheckpointEvery == 0) {
      check(er_checkpoint_save(session, checkpoint, update, NULL, 0));
      printf("update %llu loss %.4f\n", (unsigned long long)update, loss);
      fflush(stdout);
    }
  }
  if (update > begin) check(er_checkpoint_save(session, checkpoint, update, NULL, 0));
  if (stop) printf("stopped by signal %d after update %llu\n", (int)stop, (unsigned long long)update);
  free_batch(&b);
}

static void evaluate(er_session* session) {
  batch b = held_out();
  er_evaluation result;
  check(er_evaluate(session, b.arrays, kHeldOut, &result));
  printf("held out: loss %.6f accuracy %.4f\n", result.loss, result.accuracy);
  free_batch(&b);
}

static void predict(er_session* session) {
  batch b = held_out();
  float* scores = allocate((size_t)kHeldOut * kClasses, sizeof *scores);
  check(er_predict(session, b.arrays, kHeldOut, &scores));
  printf("predicted");
  for (int i = 0; i < 10; i++) {
    int best = 0;
    for (int c = 1; c < kClasses; c++)
      if (scores[i * kClasses + c] > scores[i * kClasses + best]) best = c;
    printf(" %d", best);
  }
  printf("\nexpected ");
  for (int i = 0; i < 10; i++) printf(" %d", b.labels[i]);
  printf("\n");
  free(scores);
  free_batch(&b);
}

int main(int argc, char** argv) {
  if (argc < 5) {
    fprintf(stderr,
            "usage: digits train PLAN WEIGHTS CHECKPOINT UPDATES     trains until UPDATES are done, or Ctrl-C\n"
            "       digits eval PLAN WEIGHTS CHECKPOINT              loss and accuracy on held-out images\n"
            "       digits predict PLAN WEIGHTS CHECKPOINT           the first ten of them\n"
            "       digits weights PLAN WEIGHTS CHECKPOINT FILE      writes all weights as safetensors\n");
    return 2;
  }
  const char* command = argv[1];
  er_session* session = open_session(argv[2], argv[3]);
  if (!strcmp(command, "train") && argc == 6) {
    train(session, argv[4], strtoull(argv[5], NULL, 10));
    if (!stop) evaluate(session);
  } else {
    resume(session, argv[4]);
    if (!strcmp(command, "eval")) {
      evaluate(session);
    } else if (!strcmp(command, "predict")) {
      predict(session);
    } else if (!strcmp(command, "weights") && argc == 6) {
      check(er_weights_save(session, argv[5]));
    } else {
      fprintf(stderr, "digits: there is no command '%s' with %d arguments\n", command, argc - 2);
      er_session_free(session);
      return 2;
    }
  }
  er_session_free(session);
  return stop ? 128 + (int)stop : 0;
}
