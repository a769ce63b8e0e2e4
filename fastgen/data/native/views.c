/* Executes rows of the view table on stored images: decode, crop, resample, mirror.
 *
 * A JPEG is decoded only as far as the crop needs it: rows above are skipped after their entropy decoding, rows below
 * are not read, and the inverse DCT runs on the crop's columns alone. The resampler is the triangle filter, widened by
 * the scale where it shrinks, within the crop: what Pillow calls BILINEAR and DALI LINEAR with antialiasing.
 *
 * Compiled without contraction of floating point (no fused multiply-add), so that every processor gives the same bits.
 */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

enum { JPEG_MODE = 0, CHANNELS = 3, ROW_FIELDS = 5 };
enum { OK = 0, DAMAGED = -1, OTHER_SIZE = -2, NO_MEMORY = -3 };

/* An image in memory of which a window is wanted. */
typedef struct {
    const uint8_t *pixels; /* of the pixel at (top, left) */
    size_t pitch;          /* bytes from one row to the next */
} window_t;

/* Taps of one axis: output i is the sum over k < most of weights[i * most + k] * input[first[i] + k]. Towards the
 * edge some weights are zero, and their inputs may lie up to `most` places behind the last. */
typedef struct {
    int most;
    int *first;
    float *weights;
} taps_t;

/* Memory of one thread, grown as needed and kept between calls. */
typedef struct {
    uint8_t *pixels;
    size_t pixels_bytes;
    float *row;
    size_t row_bytes;
    void *taps[2];
    size_t taps_bytes[2];
} scratch_t;

typedef struct {
    struct jpeg_error_mgr manager;
    jmp_buf escape;
} failure_t;

static void fail(j_common_ptr info) { longjmp(((failure_t *)info->err)->escape, 1); }
static void stay_silent(j_common_ptr info) { (void)info; }

static int grow(void **memory, size_t *have, size_t want) {
    if (*have >= want) return 1;
    free(*memory);
    *memory = malloc(want);
    *have = *memory ? want : 0;
    return *memory != NULL;
}

scratch_t *fastgen_scratch_new(void) { return calloc(1, sizeof(scratch_t)); }

void fastgen_scratch_free(scratch_t *scratch) {
    if (!scratch) return;
    free(scratch->pixels);
    free(scratch->row);
    free(scratch->taps[0]);
    free(scratch->taps[1]);
    free(scratch);
}

/* Decodes rows top .. top + rows of a JPEG, at least the columns left .. left + columns. */
static int decode_window(const uint8_t *bytes, size_t size, int height, int width, const int32_t *view,
                         scratch_t *scratch, window_t *window) {
    struct jpeg_decompress_struct info;
    failure_t failure;
    const int top = view[0], left = view[1], rows = view[2], columns = view[3];

    info.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = fail;
    failure.manager.output_message = stay_silent;
    if (setjmp(failure.escape)) {
        jpeg_destroy_decompress(&info);
        return DAMAGED;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, bytes, (unsigned long)size);
    jpeg_read_header(&info, TRUE);
    if ((int)info.image_height != height || (int)info.image_width != width) {
        jpeg_destroy_decompress(&info);
        return OTHER_SIZE;
    }
    info.out_color_space = JCS_RGB;
    info.dct_method = JDCT_ISLOW;
    jpeg_start_decompress(&info);

    /* Smooth upsampling of colour looks one sample to either side: one block more keeps the crop's edges exact. */
    const int block = info.max_h_samp_factor * DCTSIZE;
    JDIMENSION first = left > block ? (JDIMENSION)(left - block) : 0;
    JDIMENSION last = left + columns + block < width ? (JDIMENSION)(left + columns + block) : (JDIMENSION)width;
    JDIMENSION count = last - first;
    if (first > 0 || count < (JDIMENSION)width) jpeg_crop_scanline(&info, &first, &count);

    const size_t pitch = (size_t)info.output_width * CHANNELS;
    if (!grow((void **)&scratch->pixels, &scratch->pixels_bytes, pitch * (size_t)rows)) {
        jpeg_destroy_decompress(&info);
        return NO_MEMORY;
    }
    if (top > 0) jpeg_skip_scanlines(&info, (JDIMENSION)top);
    while ((int)info.output_scanline < top + rows) {
        JSAMPROW row = scratch->pixels + pitch * (size_t)((int)info.output_scanline - top);
        jpeg_read_scanlines(&info, &row, 1);
    }
    const int damaged = failure.manager.num_warnings > 0;
    jpeg_abort_decompress(&info);
    jpeg_destroy_decompress(&info);
    window->pixels = scratch->pixels + (size_t)(left - (int)first) * CHANNELS;
    window->pitch = pitch;
    return damaged ? DAMAGED : OK;
}

static double triangle(double distance) {
    if (distance < 0) distance = -distance;
    return distance < 1 ? 1 - distance : 0;
}

static int make_taps(int from, int to, void **memory, size_t *have, taps_t *taps) {
    const double scale = (double)from / to, stretch = scale > 1 ? scale : 1;
    /* Inputs nearer than `stretch` to the centre; those at just that distance have no weight. */
    const int room = 2 * ((int)stretch + 1) + 1;
    const size_t firsts = (size_t)to * sizeof(int);
    if (!grow(memory, have, firsts + (size_t)to * (size_t)room * sizeof(float))) return 0;
    taps->first = *memory;
    taps->weights = (float *)((char *)*memory + firsts);
    taps->most = 0;
    for (int pass = 0; pass < 2; pass++) /* how many are needed, then the weights, so many for each output */
        for (int i = 0; i < to; i++) {
            const double centre = (i + 0.5) * scale - 0.5;
            int first = (int)ceil(centre - stretch), last = (int)floor(centre + stretch);
            if (triangle((first - centre) / stretch) == 0) first++;
            if (triangle((last - centre) / stretch) == 0) last--;
            if (first < 0) first = 0;
            if (last > from - 1) last = from - 1;
            const int count = last - first + 1;
            if (pass == 0) {
                if (count > taps->most) taps->most = count;
                continue;
            }
            float *weights = taps->weights + (size_t)i * (size_t)taps->most;
            double sum = 0;
            for (int k = 0; k < count; k++) sum += triangle((first + k - centre) / stretch);
            taps->first[i] = first;
            for (int k = 0; k < taps->most; k++)
                weights[k] = k < count ? (float)(triangle((first + k - centre) / stretch) / sum) : 0;
        }
    return 1;
}

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* out[x] = sum over k < count of weights[k] * source[k][x], in the order of k. */
ALWAYS_INLINE void blend_rows_of(const uint8_t *restrict source, size_t pitch, const float *restrict weights, int count,
                                 size_t values, float *restrict out) {
    for (size_t x = 0; x < values; x++) {
        float sum = weights[0] * (float)source[x];
        for (int k = 1; k < count; k++) sum += weights[k] * (float)source[(size_t)k * pitch + x];
        out[x] = sum;
    }
}

typedef float four_floats __attribute__((vector_size(16)));
typedef int32_t four_ints __attribute__((vector_size(16)));
typedef int8_t sixteen_bytes __attribute__((vector_size(16)));

/* One pixel at a time, its three channels (and the next pixel's first, which is dropped) side by side. */
ALWAYS_INLINE void blend_columns_of(const float *row, const taps_t *taps, int count, int columns, int mirror,
                                    uint8_t *target) {
    const sixteen_bytes lowest = {0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12};
    for (int t = 0; t < columns; t++) {
        const int x = mirror ? columns - 1 - t : t;
        const float *source = row + (size_t)taps->first[x] * CHANNELS;
        const float *weights = taps->weights + (size_t)x * (size_t)count;
        four_floats sum = {0.5f, 0.5f, 0.5f, 0.5f};
        for (int k = 0; k < count; k++) {
            four_floats pixel;
            memcpy(&pixel, source + (size_t)k * CHANNELS, sizeof pixel);
            sum += pixel * weights[k];
        }
        /* The weights sum to one but for rounding, so that the largest sum is a hair above 255.5: no byte overflows. */
        const four_ints values = __builtin_convertvector(sum, four_ints);
        const sixteen_bytes bytes = __builtin_shuffle((sixteen_bytes)values, lowest);
        /* Four bytes in one go: the next pixel overwrites the last of them. */
        memcpy(target + (size_t)t * CHANNELS, &bytes, t + 1 < columns ? CHANNELS + 1 : CHANNELS);
    }
}

/* A loop of known length is unrolled: the lengths that crops of photographs lead to are worth a copy each. */
#define OF_KNOWN_LENGTH(count, call) \
    switch (count) {                 \
        case 1: call(1); break;      \
        case 2: call(2); break;      \
        case 3: call(3); break;      \
        case 4: call(4); break;      \
        case 5: call(5); break;      \
        case 6: call(6); break;      \
        case 7: call(7); break;      \
        default: call(count);        \
    }

static void blend_rows(const uint8_t *source, size_t pitch, const float *weights, int count, size_t values, float *out) {
#define ROWS(known) blend_rows_of(source, pitch, weights, known, values, out)
    OF_KNOWN_LENGTH(count, ROWS)
#undef ROWS
}

static void blend_columns(const float *row, const taps_t *taps, int columns, int mirror, uint8_t *target) {
#define COLUMNS(known) blend_columns_of(row, taps, known, columns, mirror, target)
    OF_KNOWN_LENGTH(taps->most, COLUMNS)
#undef COLUMNS
}

static int resample(const window_t *window, const int32_t *view, scratch_t *scratch, uint8_t *target, int height,
                    int width) {
    taps_t down, across;
    if (!make_taps(view[2], height, &scratch->taps[0], &scratch->taps_bytes[0], &down) ||
        !make_taps(view[3], width, &scratch->taps[1], &scratch->taps_bytes[1], &across))
        return NO_MEMORY;
    /* Behind the row lie zeros for taps without weight, and for the fourth value of the last pixel. */
    const size_t values = (size_t)view[3] * CHANNELS, behind = (size_t)across.most * CHANNELS + 1;
    if (!grow((void **)&scratch->row, &scratch->row_bytes, (values + behind) * sizeof(float))) return NO_MEMORY;
    memset(scratch->row + values, 0, behind * sizeof(float));
    for (int y = 0; y < height; y++) {
        const float *weights = down.weights + (size_t)y * (size_t)down.most;
        const int first = down.first[y], left = view[2] - first;
        const int count = down.most < left ? down.most : left;
        blend_rows(window->pixels + window->pitch * (size_t)first, window->pitch, weights, count, values, scratch->row);
        blend_columns(scratch->row, &across, width, view[4], target + (size_t)y * (size_t)width * CHANNELS);
    }
    return OK;
}

/* A window of the target's size, which may reach over the image's edge: zeros there. */
static void copy_window(const uint8_t *image, int image_height, int image_width, const int32_t *view, uint8_t *target,
                        int height, int width) {
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            const int from_y = view[0] + y, from_x = view[1] + x;
            const int inside = from_y >= 0 && from_y < image_height && from_x >= 0 && from_x < image_width;
            const uint8_t *from = image + ((size_t)from_y * (size_t)image_width + (size_t)from_x) * CHANNELS;
            uint8_t *out = target + ((size_t)y * (size_t)width + (size_t)(view[4] ? width - 1 - x : x)) * CHANNELS;
            for (int c = 0; c < CHANNELS; c++) out[c] = inside ? from[c] : 0;
        }
}

/* For each of n images: content + begin, stored bytes, mode, (height, width), row of the view table -> pixels of
 * height x width x 3 in images, and a status. The caller has checked that views lie inside their images, unless they
 * have the target's size and the image is raw. */
void fastgen_execute(int64_t n, const uint8_t *content, const int64_t *begin, const int64_t *stored_bytes,
                     const uint8_t *modes, const int32_t *sizes, const int32_t *rows, uint8_t *images, int64_t height,
                     int64_t width, scratch_t *scratch, int32_t *status) {
    for (int64_t i = 0; i < n; i++) {
        const int32_t *view = rows + i * ROW_FIELDS;
        const int image_height = sizes[2 * i], image_width = sizes[2 * i + 1];
        const uint8_t *stored = content + begin[i];
        uint8_t *target = images + i * height * width * CHANNELS;
        window_t window;
        if (modes[i] == JPEG_MODE) {
            status[i] = decode_window(stored, (size_t)stored_bytes[i], image_height, image_width, view, scratch, &window);
            if (status[i] != OK) continue;
        } else if (view[2] == height && view[3] == width) {
            copy_window(stored, image_height, image_width, view, target, (int)height, (int)width);
            status[i] = OK;
            continue;
        } else {
            window.pitch = (size_t)image_width * CHANNELS;
            window.pixels = stored + window.pitch * (size_t)view[0] + (size_t)view[1] * CHANNELS;
        }
        status[i] = resample(&window, view, scratch, target, (int)height, (int)width);
    }
}
