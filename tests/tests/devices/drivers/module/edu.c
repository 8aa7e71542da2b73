// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Stands for a vendor's driver: built outside of the kernel's tree, for QEMU's "edu"
 * (docs/specs/edu.rst there), with firmware. Its node says what the device's
 * identification is, what the firmware says, and the module's parameter.
 */
#include <linux/firmware.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>

static int level;
module_param(level, int, 0);

struct edu {
	struct miscdevice misc;
	void __iomem *registers;
	const struct firmware *word;
};

static ssize_t edu_read(struct file *file, char __user *to, size_t size, loff_t *at)
{
	struct edu *edu = container_of(file->private_data, struct edu, misc);
	char line[64];
	int length;

	length = scnprintf(line, sizeof(line), "%08x %d %.*s\n", ioread32(edu->registers), level,
			   (int)edu->word->size, edu->word->data);
	return simple_read_from_buffer(to, size, at, line, length);
}

static const struct file_operations edu_operations = {
	.owner = THIS_MODULE,
	.read = edu_read,
};

static int edu_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct edu *edu;
	int error;

	edu = devm_kzalloc(&pci->dev, sizeof(*edu), GFP_KERNEL);
	if (!edu)
		return -ENOMEM;
	error = pcim_enable_device(pci);
	if (error)
		return error;
	edu->registers = pcim_iomap(pci, 0, 0);
	if (!edu->registers)
		return -ENOMEM;
	error = request_firmware(&edu->word, "nacre/word", &pci->dev);
	if (error)
		return error;
	edu->misc = (struct miscdevice) {
		.minor = MISC_DYNAMIC_MINOR,
		.name = "edu",
		.fops = &edu_operations,
		.parent = &pci->dev,
	};
	pci_set_drvdata(pci, edu);
	error = misc_register(&edu->misc);
	if (error)
		release_firmware(edu->word);
	return error;
}

static void edu_remove(struct pci_dev *pci)
{
	struct edu *edu = pci_get_drvdata(pci);

	misc_deregister(&edu->misc);
	release_firmware(edu->word);
}

static const struct pci_device_id edu_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{}
};
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = "edu",
	.id_table = edu_ids,
	.probe = edu_probe,
	.remove = edu_remove,
};
module_pci_driver(edu_driver);

MODULE_DESCRIPTION("edu of QEMU, for tests");
MODULE_LICENSE("Dual MIT/GPL");
