/* C interface of exported engines: open a folder, make blocks, change prompt and action, save and restore.
 *
 * A function that can fail returns 0 for success and -1 for failure, or NULL where it returns a pointer; then
 * inferix_error() has one line on what is wrong and what to do. Texts are UTF-8. A stream is used by one thread at a
 * time; different streams may be used by different threads.
 */
#ifndef INFERIX_H
#define INFERIX_H

#include <stdint.h>

#if defined(_WIN32)
#define INFERIX_API __declspec(dllexport)
#else
#define INFERIX_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct inferix_stream inferix_stream;

/* frames: RGB bytes [pictures, height, width, 3]. latents: float32 [latent_frames, channels, latent_height,
 * latent_width]. Both are valid until the next call on the stream. */
typedef struct inferix_block {
    int64_t index;
    const uint8_t *frames;
    int64_t pictures, height, width;
    const float *latents;
    int64_t latent_frames, channels, latent_height, latent_width;
} inferix_block;

/* Open a stream. threads: of each program, 0 for the runtime's own number. negative_prompt: for a preset with guidance,
 * else NULL. The other arguments have no defaults. */
INFERIX_API inferix_stream *inferix_open(const char *folder, const char *prompt, const char *negative_prompt,
                                         uint64_t seed, int threads);

/* Follow another prompt from the next block on. */
INFERIX_API int inferix_prompt(inferix_stream *stream, const char *prompt);

/* Set the action of the next block's frames and all later ones. */
INFERIX_API int inferix_act(inferix_stream *stream, const char *action);

/* Make the next block. */
INFERIX_API int inferix_next_block(inferix_stream *stream, inferix_block *block);

/* Write the stream's whole state to a file; restoring it continues bit for bit on the same engine and machine. */
INFERIX_API int inferix_save(const inferix_stream *stream, const char *path);
INFERIX_API inferix_stream *inferix_restore(const char *folder, const char *path, int threads);

/* Close a stream; NULL is allowed. */
INFERIX_API void inferix_close(inferix_stream *stream);

/* The last error of this thread, valid until its next one. */
INFERIX_API const char *inferix_error(void);

#ifdef __cplusplus
}
#endif

#endif
