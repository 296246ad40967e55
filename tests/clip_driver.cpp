// The embeddings that llama.cpp's clip.cpp makes of an image whose pixels are normalised already.
//
//     clip_driver MMPROJ.gguf PIXELS.f32 WIDTH HEIGHT OUT.f32
//
// Pixels are binary32, row by row, red, green and blue of each; so is what comes out, token by token.
#include "clip.h"
#include "clip-impl.h"
#include "clip-model.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char ** argv) {
    if (argc != 6) return 2;
    const int nx = atoi(argv[3]), ny = atoi(argv[4]);
    std::vector<float> pixels((size_t) nx * ny * 3);
    FILE * in = fopen(argv[2], "rb");
    if (!in || fread(pixels.data(), sizeof(float), pixels.size(), in) != pixels.size()) return 3;
    fclose(in);
    clip_context_params params = {};
    params.flash_attn_type = CLIP_FLASH_ATTN_TYPE_DISABLED;  // which rounds keys and values
    params.image_min_tokens = params.image_max_tokens = -1;
    clip_init_result made = clip_init(argv[1], params);
    if (!made.ctx_v) return 4;
    clip_image_f32 image;
    image.set_size({nx, ny}, false, false);
    image.cpy_buf(pixels);
    const size_t tokens = clip_n_output_tokens(made.ctx_v, &image);
    std::vector<float> out(tokens * clip_n_mmproj_embd(made.ctx_v));
    if (!clip_image_encode(made.ctx_v, 1, &image, out)) return 5;
    fprintf(stderr, "%zu tokens of %zu values\n", tokens, out.size() / tokens);
    FILE * to = fopen(argv[5], "wb");
    if (!to || fwrite(out.data(), sizeof(float), out.size(), to) != out.size()) return 6;
    fclose(to);
    clip_free(made.ctx_v);
    return 0;
}
