// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Makes a word of a device's own memory a node, `canary-KIND-ADDRESS`, which tells the word as a
 * number and is written one:
 *
 *   xhci    of QEMU's "qemu-xhci": the register CONFIG, which is 0 after a reset (xHCI 1.2, 5.4.7)
 *   memory  of "ivshmem-plain": the last word of its memory, which nothing resets
 */
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/kernel.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>

struct canary {
	struct miscdevice misc;
	void __iomem *word;
};

enum { XHCI, MEMORY };

/* Where QEMU has the register. */
#define XHCI_CONFIG 0x78

static ssize_t canary_read(struct file *file, char __user *to, size_t size, loff_t *at)
{
	struct canary *canary = container_of(file->private_data, struct canary, misc);
	char line[16];
	int length;

	length = scnprintf(line, sizeof(line), "%u\n", ioread32(canary->word));
	return simple_read_from_buffer(to, size, at, line, length);
}

static ssize_t canary_write(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	struct canary *canary = container_of(file->private_data, struct canary, misc);
	unsigned int value;
	int error;

	error = kstrtouint_from_user(from, size, 10, &value);
	if (error)
		return error;
	iowrite32(value, canary->word);
	return size;
}

static const struct file_operations canary_operations = {
	.owner = THIS_MODULE,
	.read = canary_read,
	.write = canary_write,
};

static int canary_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	bool is_memory = id->driver_data == MEMORY;
	struct canary *canary;
	resource_size_t place;
	int error;

	canary = devm_kzalloc(&pci->dev, sizeof(*canary), GFP_KERNEL);
	if (!canary)
		return -ENOMEM;
	error = pcim_enable_device(pci);
	if (error)
		return error;
	if (is_memory)
		place = pci_resource_end(pci, 2) + 1 - sizeof(u32);
	else
		place = pci_resource_start(pci, 0) + XHCI_CONFIG;
	canary->word = devm_ioremap(&pci->dev, place, sizeof(u32));
	if (!canary->word)
		return -ENOMEM;
	canary->misc = (struct miscdevice) {
		.minor = MISC_DYNAMIC_MINOR,
		.name = devm_kasprintf(&pci->dev, GFP_KERNEL, "canary-%s-%s",
				       is_memory ? "memory" : "xhci", pci_name(pci)),
		.fops = &canary_operations,
		.parent = &pci->dev,
	};
	if (!canary->misc.name)
		return -ENOMEM;
	pci_set_drvdata(pci, canary);
	return misc_register(&canary->misc);
}

static void canary_remove(struct pci_dev *pci)
{
	struct canary *canary = pci_get_drvdata(pci);

	misc_deregister(&canary->misc);
}

static const struct pci_device_id canary_ids[] = {
	{ PCI_DEVICE(0x1b36, 0x000d), .driver_data = XHCI },
	{ PCI_DEVICE(0x1af4, 0x1110), .driver_data = MEMORY },
	{}
};
MODULE_DEVICE_TABLE(pci, canary_ids);

static struct pci_driver canary_driver = {
	.name = "canary",
	.id_table = canary_ids,
	.probe = canary_probe,
	.remove = canary_remove,
};
module_pci_driver(canary_driver);

MODULE_DESCRIPTION("a word of a device's memory, for tests");
MODULE_LICENSE("Dual MIT/GPL");
